"""TOPR (arXiv 2503.14286): what is right is imitated, what is wrong is pushed down as far as the policy still says it.

    reward R > 0    -R log pi
    reward R < 0    -sg(min(1, pi(y) / mu(y))) R log pi,   pi(y) and mu(y) of the whole answer

A reward of 0 counts as `wrong`. Rows that nobody sampled, traces, have no mu: a wrong one is left out. Criterion: the
mean reward of rollouts rises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from luffy.objectives.asymre import Asymre, OfferedOptions

if TYPE_CHECKING:
    from luffy.groups import Group, Row
    from luffy.objectives.looking import Seen
    from luffy.packing import MicroBatch


class Topr(Asymre):
    class Options(OfferedOptions):
        name: Literal["topr"] = "topr"
        wrong: Annotated[float, Field(le=0)] = -1.0
        """What a reward of 0 counts as."""

    looks: ClassVar = "logp"
    corrects: ClassVar = True

    def assign(self, group: Group, progress: float) -> list[Row]:
        for row in group.rows:
            row.advantage, row.weight = row.reward or self.options.wrong, 1.0
        return [row for row in self.alive(group.rows) if row.advantage > 0 or not row.is_trace]

    def weigh(self, micro: MicroBatch, seen: Seen) -> None:
        from luffy.objectives.looking import moved, row_sums

        ratio = row_sums(moved(seen, micro.sampler_logp), micro).clamp(max=0).exp()[micro.row].float()
        micro.token_weight = micro.token_weight * ratio.where(micro.advantages < 0, 1.0)
