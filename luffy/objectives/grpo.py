"""Groups of rollouts, compared with each other.

    loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),  r = pi / pi_old,  A = reward - mean(group)

GRPO (arXiv 2402.03300, eq. 3) divides A by the group's standard deviation, and averages over each answer's tokens and
then over answers. Dr.GRPO (arXiv 2503.20783) does neither: it sums and divides by a constant.

Criterion: the mean reward of rollouts rises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from luffy.advantages import group_advantages
from luffy.objectives import base
from luffy.sections import NonNegative, Positive

if TYPE_CHECKING:
    from luffy_kernels.token_losses import TokenLoss

    from luffy.groups import Group, Row


class GroupOptions(base.Options):
    rows: Annotated[int, Field(ge=2)] = 8
    """Rows per prompt, traces among them."""
    normalizer: Positive | Literal["tokens", "sequences"] = "tokens"
    """What the summed policy loss of one update is divided by: a constant (LUFFY's code: 65536 per 512 rows), `tokens`
    (every token counts the same) or `sequences` (the mean over rows of each row's mean)."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus, a mean over response tokens."""
    kl_coef: NonNegative = 0.0
    """Weight of the divergence from the model that the run begins with, a mean over response tokens of the estimate k3
    = q/p - log q/p - 1; 0: that model is not loaded."""

    @model_validator(mode="after")
    def _has_rollouts(self) -> Self:
        if self.shown >= self.rows:
            raise ValueError(f"traces must be fewer than rows, got {self.shown} of {self.rows}")
        return self

    @property
    def sampled(self) -> int:
        return self.rows - self.shown


class ComparedOptions(GroupOptions):
    advantage_std: bool = False
    """Divide advantages by the group's standard deviation."""


class RatioOptions(ComparedOptions):
    clip_low: Positive | None = None
    """Clip of the ratio to the policy that sampled below, as a distance from 1; null: no clip. With one update a step
    the ratio is 1 and a clip does nothing."""
    clip_high: Positive | None = None
    """The same above."""


class Grpo(base.Objective):
    class Options(RatioOptions):
        name: Literal["grpo"] = "grpo"
        clip_low: Positive | None = 0.2
        clip_high: Positive | None = 0.2
        advantage_std: bool = True
        normalizer: Positive | Literal["tokens", "sequences"] = "sequences"

    def token_losses(self) -> tuple[TokenLoss, ...]:
        from luffy_kernels.token_losses import policy_gradient

        return (policy_gradient(self.options.clip_low, self.options.clip_high),)

    def rewards(self, group: Group) -> list[float]:
        """Of each row, what its advantage is made of."""
        return [row.reward for row in group.rows]

    def assign(self, group: Group, progress: float) -> list[Row]:
        advantages = group_advantages(self.rewards(group), self.options.advantage_std)
        for row, advantage in zip(group.rows, advantages, strict=True):
            row.advantage, row.weight = advantage, 1.0
        return self.alive(group.rows)

    def alive(self, rows: list[Row]) -> list[Row]:
        """Those with a gradient. Of advantage 0 a policy loss has none, but what is added for every token has one."""
        return [row for row in rows if row.advantage or self.options.entropy_coef or self.options.kl_coef]


class DrGrpo(Grpo):
    class Options(RatioOptions):
        name: Literal["dr_grpo"] = "dr_grpo"
        clip_low: Positive | None = 0.2
        clip_high: Positive | None = 0.2
        normalizer: Positive | Literal["tokens", "sequences"] = 65536.0
        entropy_coef: NonNegative = 0.001
