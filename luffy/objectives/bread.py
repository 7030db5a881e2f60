"""BREAD: branched rollouts from expert anchors (arXiv 2506.17211). Where all of a problem's rollouts fail they are
sampled again from a trace's beginning, a longer one each time, until one is right.

    GRPO's loss of sampled tokens; the prefix is part of the prompt, nothing is learned of it

The n-th try begins with 1 - 2^-n of a trace: a half, three quarters, seven eighths. Published is a search for the
shortest beginning with a success; unverified: its order, so ours goes from the shortest of these.

Rows: rollouts, all of a group from the same place. Criterion: the mean reward of rollouts rises, with fewer tries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from luffy.objectives.choice import Known, only_by
from luffy.objectives.prefixed import Prefixed, PrefixOptions
from luffy.sections import NonNegative

if TYPE_CHECKING:
    from luffy.groups import Group


class Bread(Prefixed):
    class Options(PrefixOptions):
        name: Literal["bread"] = "bread"
        clip_low: NonNegative | None = 0.2
        clip_high: NonNegative | None = 0.2
        advantage_std: bool = True
        tries: Annotated[int, Field(ge=1, le=8)] = 3
        """Beginnings that are tried, at most."""

        @model_validator(mode="after")
        def _choice_is_known(self) -> Self:
            only_by(self, ("first", "random", "shortest", "longest"))
            return self

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.tries = options.tries

    def again(self, group: Group, number: int) -> list[tuple[int, int]]:
        at = self.begin(group.example, Known(seed=group.position))
        if at is None or any(row.solved for row in group.rows):
            return []
        tokens = round((1 - 0.5 ** (number + 1)) * len(group.example.traces[at]))
        return [(at, tokens)] * self.options.rows
