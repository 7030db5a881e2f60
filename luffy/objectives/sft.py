"""Supervised baseline: negative log-likelihood of the traces, one global token mean per update.

The rows are the same traces, a step at a time, that LUFFY would see. Nothing is sampled. `trace_filter` drops the
traces that fail the verifier; without it SFT imitates whatever it is given. Criterion: the probability of traces rises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from luffy.objectives import base
from luffy.objectives.choice import TraceOptions

if TYPE_CHECKING:
    from luffy_kernels.token_losses import TokenLoss

    from luffy.groups import Group, Row


class Sft(base.Objective):
    class Options(TraceOptions):
        name: Literal["sft"] = "sft"
        trace_filter: bool = False
        """Leave out traces that fail the verifier."""

    def token_losses(self) -> tuple[TokenLoss, ...]:
        from luffy_kernels.token_losses import nll

        return (nll(),)

    def rollouts(self, traces: int) -> int:
        return 0

    def assign(self, group: Group, progress: float) -> list[Row]:
        for row in group.rows:
            row.advantage, row.weight = 1.0, 1.0
        return self.counted(group)

    def counted(self, group: Group) -> list[Row]:
        return [row for row in group.rows if row.solved or not self.options.trace_filter]
