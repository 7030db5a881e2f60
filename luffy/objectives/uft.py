"""UFT, unified fine-tuning (arXiv 2505.16984): rollouts go on from a hint, which grows shorter until there is none.

    -A pi/pi_old of sampled tokens, A = reward - mean(group);  + hint_coef (-log p) of the hint's tokens, once a group

All rollouts of a group begin with the same first tokens of a trace: a binomial number of them, of mean p(t) |trace|,

    p(t) = low + (high - low) (1 + cos(pi t / T)) / 2 until t = T, then 0                          (appendix, eq. B.1)

T being a share of the run's steps. Unverified: the paper counts a hint in steps of a solution, here in tokens; its
small KL to the initial policy is `kl_coef`, 0 unless it is asked for.

Rows: rollouts. Criterion: the mean reward of rollouts rises, without hints too.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from luffy.objectives.prefixed import Prefixed, PrefixOptions, cosine
from luffy.sections import Fraction, NonNegative

if TYPE_CHECKING:
    from luffy_kernels.token_losses import TokenLoss

    from luffy.data import Example
    from luffy.groups import Group, Row
    from luffy.objectives.choice import Known

ROLLOUT, HINT = 0, 1


class Uft(Prefixed):
    class Options(PrefixOptions):
        name: Literal["uft"] = "uft"
        clip_low: NonNegative | None = 0.2
        clip_high: NonNegative | None = 0.2
        high: Fraction = 0.95
        """Mean share of a trace that is given at the run's beginning."""
        low: Fraction = 0.05
        """The same where hints end."""
        hinted: Annotated[float, Field(gt=0, le=1)] = 0.5
        """Share of the steps that have hints."""
        hint_coef: NonNegative = 0.001
        """Weight of the likelihood of the hint's tokens."""

    def token_losses(self) -> tuple[TokenLoss, ...]:
        from luffy_kernels.token_losses import nll

        return (*super().token_losses(), nll())

    def prefixes(self, example: Example, known: Known) -> list[tuple[int, int]]:
        o, at = self.options, self.begin(example, known)
        if at is None or known.progress >= o.hinted:
            return []
        share, rng = cosine(o.high, o.low, known.progress / o.hinted), random.Random(known.seed)
        tokens = sum(rng.random() < share for _ in example.traces[at])
        return [(at, tokens)] * o.rows

    def assign(self, group: Group, progress: float) -> list[Row]:
        alive = super().assign(group, progress)
        hinted = [row for row in group.rows if row.prefix][:1] if self.options.hint_coef else []
        for row in hinted:
            row.prefix_loss, row.prefix_weight = HINT, self.options.hint_coef
        return alive + [row for row in hinted if not any(row is other for other in alive)]
