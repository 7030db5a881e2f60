"""GSPO (arXiv 2507.18071, eq. 5 to 7): the ratio is a sequence's, and so is its clip.

    s = exp(mean over tokens of log pi / pi_old)
    loss of an answer = max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high))

Its gradient in a token's log-prob is -A s / |y|, and 0 on the clipped side: here the loss -A log pi under the weight s.
Criterion: the mean reward of rollouts rises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from luffy.objectives.grpo import Grpo, RatioOptions
from luffy.sections import Positive

if TYPE_CHECKING:
    from luffy_kernels.token_losses import TokenLoss

    from luffy.objectives.looking import Seen
    from luffy.packing import MicroBatch


class Gspo(Grpo):
    class Options(RatioOptions):
        name: Literal["gspo"] = "gspo"
        clip_low: Positive | None = 3e-4
        clip_high: Positive | None = 4e-4
        advantage_std: bool = True
        normalizer: Positive | Literal["tokens", "sequences"] = "sequences"

    looks: ClassVar = "logp"

    def token_losses(self) -> tuple[TokenLoss, ...]:
        from luffy_kernels.token_losses import reinforce

        return (reinforce(),)

    def weigh(self, micro: MicroBatch, seen: Seen) -> None:
        from luffy.objectives.looking import moved, row_lengths, row_sums

        s = (row_sums(moved(seen, micro.old_logp), micro) / row_lengths(micro)).exp()[micro.row]
        low, high = (float("inf") if x is None else x for x in (self.options.clip_low, self.options.clip_high))
        clipped = ((micro.advantages > 0) & (s > 1 + high)) | ((micro.advantages < 0) & (s < 1 - low))
        micro.token_weight = micro.token_weight * s.masked_fill(clipped, 0.0).float()
