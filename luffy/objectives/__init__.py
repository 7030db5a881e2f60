"""Objectives: which rows a group has, their advantages, and the token loss of each.

One small file per objective; the loop asks it four things (see `Objective`) and knows nothing else of the method.
"""

from typing import Protocol

from luffy_kernels.token_losses import TokenLoss

from luffy.config import ObjectiveConfig
from luffy.data import Example
from luffy.groups import Group, Row


class Objective(Protocol):
    def __init__(self, config: ObjectiveConfig) -> None: ...

    losses: tuple[TokenLoss, ...]
    """Token losses, indexed by a row's `loss_id`."""

    def num_rollouts(self, example: Example) -> int:
        """Rollouts to sample for a problem."""

    def num_traces(self, example: Example) -> int:
        """Traces of the problem that join its group."""

    def assign(self, group: Group) -> list[Row]:
        """Fill `advantage`, `loss_id` and `weight` of every row, rewards being known; returns the rows whose gradient
        is not zero by construction. The others never enter the model."""

    def counted(self, group: Group) -> list[Row]:
        """Rows that the loss is a mean over, where it is one: also those that `assign` leaves out because their
        gradient is zero."""

    def scales(self, tokens: int, rows: int) -> tuple[float, float]:
        """(normalizer, entropy_coef) of an update whose counted rows are so many, with so many response tokens, on all
        ranks and in all micro-batches: what the summed loss is divided by, and the entropy coefficient in units of that
        sum."""


def make_objective(config: ObjectiveConfig) -> Objective:
    from luffy.objectives.grpo import Grpo
    from luffy.objectives.luffy import Luffy
    from luffy.objectives.sft import Sft

    known: dict[str, type[Objective]] = {"luffy": Luffy, "grpo": Grpo, "sft": Sft}
    return known[config.name](config)
