"""OAPL (arXiv 2602.19362): the optimum of KL-regularised RL as a regression, exact for rows of older policies.

    loss of a row = (beta2 S - (R - V))^2,   S = sum over tokens of log pi / mu,
                    V = beta1 log mean over the group of e^(R / beta1)

Its gradient in every token's log-prob is 2 beta2 (beta2 S - (R - V)): here -A log pi with A the negative of it.
Criterion: the mean reward of rollouts rises.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar, Literal

from luffy.objectives.grpo import GroupOptions, Grpo
from luffy.sections import Positive

if TYPE_CHECKING:
    from luffy_kernels.token_losses import TokenLoss

    from luffy.groups import Group, Row
    from luffy.objectives.looking import Seen
    from luffy.packing import MicroBatch


class Oapl(Grpo):
    class Options(GroupOptions):
        name: Literal["oapl"] = "oapl"
        beta1: Positive = 1.0
        """Temperature of the group's value V, in units of reward. Ours, as beta2: the survey that we have gives none
        for OAPL, and 0.5 and 0.001 for its relative A*-PO."""
        beta2: Positive = 0.1
        """Reward of a nat of S. Ours."""

    looks: ClassVar = "logp"
    corrects: ClassVar = True

    def token_losses(self) -> tuple[TokenLoss, ...]:
        from luffy_kernels.token_losses import reinforce

        return (reinforce(),)

    def assign(self, group: Group, progress: float) -> list[Row]:
        beta, rewards = self.options.beta1, [row.reward for row in group.rows]
        best = max(rewards, default=0.0)  # taken out before the exponential
        value = best + beta * math.log(fmean(math.exp((r - best) / beta) for r in rewards)) if rewards else 0.0
        for row in group.rows:
            row.advantage, row.weight = row.reward - value, 1.0
        return group.rows

    def weigh(self, micro: MicroBatch, seen: Seen) -> None:
        from luffy.objectives.looking import moved, row_sums

        beta = self.options.beta2
        s = row_sums(moved(seen, micro.sampler_logp), micro)[micro.row].float()
        micro.advantages = 2 * beta * (micro.advantages - beta * s)
