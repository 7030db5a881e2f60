"""On-policy baseline: Dr.GRPO (arXiv 2503.20783), groups of rollouts only.

    loss = -A r,  r = pi / pi_old  (clipped where `clip_low`/`clip_high` are set),  A = reward - mean(group)

summed over tokens and divided by a constant (or by the number of tokens, or averaged over rows: `normalizer`); minus an
entropy bonus that is a token mean.
"""

from luffy_kernels.token_losses import TokenLoss, policy_gradient

from luffy.advantages import group_advantages
from luffy.config import ObjectiveConfig
from luffy.data import Example
from luffy.groups import Group, Row


class Grpo:
    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self.losses: tuple[TokenLoss, ...] = (policy_gradient(config.clip_low, config.clip_high),)

    def num_rollouts(self, example: Example) -> int:
        return self.config.rows - self.num_traces(example)

    def num_traces(self, example: Example) -> int:
        return 0

    def assign(self, group: Group) -> list[Row]:
        advantages = group_advantages([row.reward for row in group.rows], self.config.advantage_std)
        for row, advantage in zip(group.rows, advantages, strict=True):
            row.advantage = advantage
            row.weight = 1 / len(row.token_ids) if self.config.normalizer == "sequences" else 1.0
        # an entropy bonus reaches every token; without one a row of advantage 0 has no gradient at all
        return [row for row in group.rows if row.advantage or self.config.entropy_coef]

    def counted(self, group: Group) -> list[Row]:
        return group.rows

    def scales(self, tokens: int, rows: int) -> tuple[float, float]:
        chosen = self.config.normalizer
        normalizer = float({"tokens": tokens, "sequences": rows}[chosen] if isinstance(chosen, str) else chosen)
        return normalizer, self.config.entropy_coef * normalizer / max(tokens, 1)
