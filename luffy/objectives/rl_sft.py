"""RL with an SFT loss: the baseline of LUFFY's paper (arXiv 2504.14945, appendix; its code's `grpo_split`).

    -A pi/pi_old of rollouts, A = reward - mean(rollouts), summed and divided by a constant
    + coef times the mean of -log p over the tokens of the traces

The published code takes that mean within each micro-batch and adds them up; here it is one mean over the update.
Criterion: the mean reward of rollouts rises, and so does the probability of traces.
"""

from __future__ import annotations

from typing import Literal

from luffy.objectives.guided import Guided, GuidedOptions
from luffy.sections import NonNegative, Positive


class RlSft(Guided):
    class Options(GuidedOptions):
        name: Literal["rl_sft"] = "rl_sft"
        normalizer: Positive | Literal["tokens", "sequences"] = 65536.0
        entropy_coef: NonNegative = 0.001
        coef: Positive = 1.0
        """Weight of the traces' likelihood."""

    def imitation(self, progress: float) -> float:
        return self.options.coef
