"""LUFFY: learning to reason under off-policy guidance (arXiv 2504.14945; its published recipe).

A group is rows-1 rollouts and one trace of a stronger model, verified like the rollouts and counted in the group mean.
Rollout tokens: -A pi/pi_old. Trace tokens, their behaviour probability taken as 1:

    -A f(p),  f(p) = p / (p + gamma),  gradient to log p: -A gamma p / (p + gamma)^2

A problem without a usable trace gets one more rollout instead. A trace that fails the verifier has reward 0 and hence
a non-positive advantage: it is pushed down, as published.
"""

from luffy_kernels.token_losses import shaped

from luffy.config import ObjectiveConfig
from luffy.data import Example
from luffy.groups import Group, Row
from luffy.objectives.grpo import Grpo

ROLLOUT, TRACE = 0, 1


class Luffy(Grpo):
    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        self.losses = (*self.losses, shaped(config.gamma))

    def num_traces(self, example: Example) -> int:
        return min(1, len(example.traces))

    def assign(self, group: Group) -> list[Row]:
        for row in group.rows:
            row.loss_id = TRACE if row.is_trace else ROLLOUT
        return super().assign(group)
