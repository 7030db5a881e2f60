"""Prefix-RFT (arXiv 2507.01679): some rollouts of a group are a trace's beginning, gone on with by the policy.

    -A pi/pi_old, A = reward - mean(group), of sampled tokens and of those of the prefix that the policy is unsure of

A prefix is a share of its trace that falls along a cosine from `high` to `low`. Of its tokens the `unsure` share with
the highest entropy is learned from, the others have no gradient. The policy's own probability before the step stands
in for the teacher's. Unverified: whether the published code breaks ties, and takes the quantile over the prefix alone
(as here) or over the micro-batch.

Rows: rollouts, `traces` of them with a prefix. Criterion: the mean reward of rollouts rises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from luffy.objectives.choice import choose
from luffy.objectives.prefixed import Prefixed, PrefixOptions, cosine
from luffy.sections import Fraction, Positive

if TYPE_CHECKING:
    from luffy.data import Example
    from luffy.groups import Group, Row
    from luffy.objectives.choice import Known
    from luffy.objectives.looking import Seen
    from luffy.packing import MicroBatch


class PrefixRft(Prefixed):
    class Options(PrefixOptions):
        name: Literal["prefix_rft"] = "prefix_rft"
        normalizer: Positive | Literal["tokens", "sequences"] = 65536.0
        high: Fraction = 0.95
        """Share of a trace that is given at the run's beginning."""
        low: Fraction = 0.05
        """At its end."""
        unsure: Fraction = 0.2
        """Share of a prefix's tokens that are learned from."""

    looks: ClassVar = "entropy"

    def prefixes(self, example: Example, known: Known) -> list[tuple[int, int]]:
        share = cosine(self.options.high, self.options.low, known.progress)
        return [(at, round(share * len(example.traces[at]))) for at in choose(example, self.options, known)]

    def assign(self, group: Group, progress: float) -> list[Row]:
        alive = super().assign(group, progress)
        for row in group.rows:
            row.prefix_weight = 1.0
        return alive

    def weigh(self, micro: MicroBatch, seen: Seen) -> None:
        from luffy.objectives.looking import highest

        assert seen.entropy is not None
        learned = highest(seen.entropy, micro.is_trace, micro, self.options.unsure)
        micro.token_weight = micro.token_weight * (learned | ~micro.is_trace)
