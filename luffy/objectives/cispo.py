"""CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4): the ratio is clipped and not its gradient; every token keeps one.

    loss = -sg(min(r, 1 + clip_high)) A log pi

The paper gives no number for its bound, and has no lower one; 4 is ours. Criterion: the mean reward of rollouts rises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from luffy.objectives.grpo import ComparedOptions, Grpo
from luffy.sections import Positive

if TYPE_CHECKING:
    from luffy_kernels.token_losses import TokenLoss


class Cispo(Grpo):
    class Options(ComparedOptions):
        name: Literal["cispo"] = "cispo"
        clip_high: Positive | None = 4.0
        """The ratio counts up to 1 + clip_high; null: all of it."""
        advantage_std: bool = True

    def token_losses(self) -> tuple[TokenLoss, ...]:
        from luffy_kernels.token_losses import cispo

        return (cispo(float("inf") if self.options.clip_high is None else self.options.clip_high),)
