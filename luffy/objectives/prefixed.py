"""What objectives share whose rollouts go on from the beginning of a trace."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from luffy.objectives.choice import TracesAside, choose, refuse_without
from luffy.objectives.grpo import Grpo, RatioOptions

if TYPE_CHECKING:
    from luffy.data import Example
    from luffy.groups import Group, Row
    from luffy.objectives.choice import Known


class PrefixOptions(RatioOptions, TracesAside):
    pass


class Prefixed(Grpo):
    """The rows are rollouts, of which some begin with a part of a trace."""

    def begin(self, example: Example, known: Known) -> int | None:
        """Number of the trace that rollouts begin with."""
        return next(iter(choose(example, self.options, known)), None)

    def prepare(self, examples: list[Example]) -> None:
        refuse_without(examples, self.options)

    def assign(self, group: Group, progress: float) -> list[Row]:
        """Nothing is learned of what was given."""
        for row in group.rows:
            row.prefix_weight = 0.0
        return super().assign(group, progress)


def cosine(high: float, low: float, done: float) -> float:
    """From high to low as `done` goes from 0 to 1."""
    return low + (high - low) * (1 + math.cos(math.pi * min(1.0, done))) / 2
