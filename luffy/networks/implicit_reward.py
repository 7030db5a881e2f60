"""PRIME's process reward model (arXiv 2502.01456, eq. 3; its training is arXiv 2412.01981's): an LM phi of which nobody
asks for text. What it adds to the reference's log-probs is the reward.

    r(token) = beta (log phi - log reference),  r(answer) = their sum
    loss = cross-entropy of sigmoid(r(answer)) and the answer's outcome, a mean over answers
    d loss / d log phi(token) = beta (sigmoid(r(answer)) - outcome) / answers

It begins with the reference's weights. It learns a step's outcomes before it is asked for the step's rewards, so that
these hold what there was to learn of them ("double forward" in the paper); or, with `reward_update = "after"`, after
the policy has learned, and the first step has no process rewards ("single forward").
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from luffy.networks.base import Taught
from luffy.objectives.looking import row_sums
from luffy.packing import MicroBatch


class ImplicitReward(Taught):
    name: ClassVar = "implicit_reward"

    @property
    def lr(self) -> float:
        return self.options.reward_lr

    @property
    def max_grad_norm(self) -> float:
        return self.options.reward_max_grad_norm

    @property
    def learns_first(self) -> bool:
        return self.options.reward_update == "before"

    def learn(self, micros: list[MicroBatch], update: int, total: int) -> dict[str, float]:
        """Outcomes are the rewards."""
        share = 1 / self.world.sequence_ranks  # ranks that share an answer's tokens all know its reward
        [answers] = self.world.sum([share * sum(micro.num_rows for micro in micros)])
        loss = 0.0
        for micro in micros:
            logp = self.model(micro)
            slope, each = self._cross_entropy(logp.detach(), micro)
            (slope * logp).sum().div(max(answers, 1.0)).backward()
            loss += share * each.sum().item() / max(answers, 1.0)
        return self.step("reward_model/ce_loss", loss, update, total)

    @torch.no_grad()
    def _cross_entropy(self, logp: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """([N] derivative in each log-prob, [R] loss of each answer), not divided by anything."""
        assert micro.ref_logp is not None
        assert micro.rewards is not None
        beta = self.options.beta
        reward = row_sums(beta * (logp - micro.ref_logp), micro)
        outcome = micro.rewards.double()
        slope = beta * (reward.sigmoid() - outcome)
        return slope[micro.row].float(), softplus(reward) - outcome * reward
