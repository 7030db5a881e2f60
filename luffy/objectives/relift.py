"""ReLIFT (arXiv 2506.07527): reinforcement learning, interleaved with fine-tuning on what it cannot solve.

    -A pi/pi_old of rollouts, A = reward - mean(group)
    and now and then an update of its own: the mean of -log p over the tokens of `demonstrations` traces

A problem none of whose rollouts is right puts a trace into a buffer. When that has `demonstrations` of them, the update
after the step's learns from these, and they leave it. Published has an optimizer of its own for them; here it is the
policy's, at the rate of the step.

Rows: rollouts. State: the buffer. Criterion: the mean reward of rollouts rises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import PositiveInt, model_validator

from luffy.groups import Group, Row
from luffy.objectives.base import Terms
from luffy.objectives.choice import Known, TracesAside, choose, may_choose, only_by, refuse_without
from luffy.objectives.grpo import Grpo, RatioOptions
from luffy.seeds import derive

if TYPE_CHECKING:
    from luffy_kernels.token_losses import TokenLoss
    from torch import Tensor

    from luffy.data import Example

ROLLOUT, IMITATED = 0, 1


class Relift(Grpo):
    class Options(RatioOptions, TracesAside):
        name: Literal["relift"] = "relift"
        demonstrations: PositiveInt = 64
        """Traces of an update that imitates."""

        @model_validator(mode="after")
        def _choice_is_known(self) -> Self:
            only_by(self, ("first", "random", "shortest", "longest", "curriculum"))
            return self

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.buffer: list[tuple[int, int]] = []
        """(number of the example, of its trace)"""

    def token_losses(self) -> tuple[TokenLoss, ...]:
        from luffy_kernels.token_losses import nll

        return (*super().token_losses(), nll())

    def prepare(self, examples: list[Example]) -> None:
        refuse_without(examples, self.options)
        self.examples = examples

    def may_choose(self, example: Example) -> list[int]:
        return may_choose(example, self.options)

    def extra(self, groups: list[Group], progress: float) -> list[Terms]:
        waiting = {index for index, _ in self.buffer}
        for group in groups:
            if group.index not in waiting and not any(row.solved for row in group.rows):
                known = Known(seed=derive(group.position), progress=progress)
                self.buffer += [(group.index, at) for at in choose(group.example, self.options, known)]
        found = []
        while len(self.buffer) >= (size := self.options.demonstrations):
            found.append(self._imitate(self.buffer[:size]))
            del self.buffer[:size]
        return found

    def _imitate(self, chosen: list[tuple[int, int]]) -> Terms:
        groups = []
        for index, at in chosen:
            example = self.examples[index]
            row = Row(token_ids=example.traces[at], text="", is_trace=True, advantage=1.0, loss_id=IMITATED)
            groups.append(Group(example=example, rows=[row], index=index))
        tokens = sum(row.num_targets for group in groups for row in group.rows)
        rows = [group.rows for group in groups]
        return Terms(groups=groups, rows=rows, normalizer=float(tokens), entropy_coef=0.0, extra=True)

    def metrics(self) -> dict[str, float]:
        return {"relift/buffer": float(len(self.buffer))}

    def state(self) -> dict[str, Tensor]:
        import torch

        return {"buffer": torch.tensor(self.buffer, dtype=torch.int64).reshape(-1, 2)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.buffer = [(index, at) for index, at in state["buffer"].tolist()]
