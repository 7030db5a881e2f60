"""Supervised baseline: negative log-likelihood of the traces, one global token mean per update.

The rows are the same traces, a step at a time, that LUFFY would see. Nothing is sampled. `trace_filter` drops the
traces that fail the verifier; without it SFT imitates whatever it is given.
"""

from luffy_kernels.token_losses import TokenLoss, nll

from luffy.config import ObjectiveConfig
from luffy.data import Example
from luffy.groups import Group, Row


class Sft:
    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self.losses: tuple[TokenLoss, ...] = (nll(),)

    def num_rollouts(self, example: Example) -> int:
        return 0

    def num_traces(self, example: Example) -> int:
        return min(1, len(example.traces))

    def assign(self, group: Group) -> list[Row]:
        return [row for row in group.rows if row.solved or not self.config.trace_filter]

    def counted(self, group: Group) -> list[Row]:
        return self.assign(group)

    def scales(self, tokens: int, rows: int) -> tuple[float, float]:
        return float(max(tokens, 1)), 0.0
