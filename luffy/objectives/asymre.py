"""AsymRE (arXiv 2506.20520): off-policy REINFORCE without a ratio; a baseline below the mean makes it safe.

    loss = -(reward - V) log pi,    V = mean(group) + shift,  shift < 0

Nothing is asked about who sampled: rows of any age or origin will do, traces among them. Criterion: the mean reward of
rollouts rises.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from luffy.objectives.choice import TraceOptions
from luffy.objectives.grpo import GroupOptions, Grpo

if TYPE_CHECKING:
    from luffy_kernels.token_losses import TokenLoss

    from luffy.groups import Group, Row


class OfferedOptions(GroupOptions, TraceOptions):
    traces: Annotated[int, Field(ge=0)] = 0
    """Traces of a problem that join its group, at most."""


class Asymre(Grpo):
    class Options(OfferedOptions):
        name: Literal["asymre"] = "asymre"
        shift: Annotated[float, Field(le=0)] = -0.1
        """What the baseline lies below the mean."""

    def token_losses(self) -> tuple[TokenLoss, ...]:
        from luffy_kernels.token_losses import reinforce

        return (reinforce(),)

    def assign(self, group: Group, progress: float) -> list[Row]:
        baseline = fmean(row.reward for row in group.rows) + self.options.shift if group.rows else 0.0
        for row in group.rows:
            row.advantage, row.weight = row.reward - baseline, 1.0
        return self.alive(group.rows)
