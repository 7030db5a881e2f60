"""HPT, hybrid post-training (arXiv 2509.04419): a problem's rollouts decide how it is learned from.

    at most `threshold` of them right    -log p of the trace, the rollouts are dropped
    more                                 -A pi/pi_old of the rollouts, A = reward - mean, the trace is dropped

Published: 0 for Qwen, 2 for Llama. How the two parts are scaled to each other we did not find; `coef` is ours.
Criterion: the mean reward of rollouts rises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from luffy.objectives.guided import Guided, GuidedOptions
from luffy.sections import NonNegative, Positive

if TYPE_CHECKING:
    from luffy.groups import Group, Row


class Hpt(Guided):
    class Options(GuidedOptions):
        name: Literal["hpt"] = "hpt"
        normalizer: Positive | Literal["tokens", "sequences"] = 65536.0
        entropy_coef: NonNegative = 0.001
        threshold: Annotated[int, Field(ge=0)] = 0
        """Right rollouts up to which the trace is imitated."""
        coef: Positive = 1.0
        """Weight of the traces' likelihood."""

    def imitation(self, progress: float) -> float:
        return self.options.coef

    def _fails(self, group: Group) -> bool:
        right = sum(row.solved for row in group.rows if not row.is_trace)
        return right <= self.options.threshold and bool(group.traces)

    def imitated(self, group: Group) -> list[Row]:
        return group.traces if self._fails(group) else []

    def learned(self, group: Group) -> list[Row]:
        return [] if self._fails(group) else super().learned(group)
