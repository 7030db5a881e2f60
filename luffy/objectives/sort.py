"""SORT (arXiv 2605.11505): where every rollout fails, imitate what a plan makes likely.

    -A pi/pi_old of rollouts;  + coef omega (-log p), a mean over the traces of problems that no rollout solves,
    omega = sg sqrt(p(y | x) p(y | x, plan)), of each token

The second probability is the engine's, of the trace after the question with the plan at its end. A plan is the data's
(`extra_info.plan`), else the answer. Unverified: the paper's weight, of which we know that it is a geometric mean and
grows where the plan raises the probability. A plan of more than `plan_tokens` is left out, and then omega is p(y | x).

Rows: rollouts and traces. Criterion: the mean reward of rollouts rises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt

from luffy.objectives.guided import IMITATED, Guided, GuidedOptions
from luffy.sections import Positive

if TYPE_CHECKING:
    from luffy.data import Example
    from luffy.groups import Group, Row
    from luffy.objectives.looking import Seen
    from luffy.packing import MicroBatch


class Sort(Guided):
    class Options(GuidedOptions):
        name: Literal["sort"] = "sort"
        coef: Positive = 1.0
        """Weight of the traces' likelihood."""
        plan_tokens: PositiveInt = 512
        """Longest plan that the engine is shown."""

        @property
        def compares(self) -> bool:
            return True

    looks: ClassVar = "logp"

    def imitation(self, progress: float) -> float:
        return self.options.coef

    def imitated(self, group: Group) -> list[Row]:
        return [] if any(row.solved for row in group.rows if not row.is_trace) else group.traces

    def hint(self, example: Example) -> str | None:
        answer = example.problem.answer
        first = answer if isinstance(answer, str) else answer[0]
        return str(example.problem.extra.get("plan") or f"The answer is {first}.")

    def scored(self, example: Example) -> int:
        return max(map(len, example.traces), default=0) + self.options.plan_tokens

    def weigh(self, micro: MicroBatch, seen: Seen) -> None:
        p = seen.logp.exp()
        planned = p if micro.behaviour is None else micro.behaviour.exp().to(p).where(~micro.behaviour.isnan(), p)
        micro.token_weight = micro.token_weight * (p * planned).sqrt().where(micro.loss_id == IMITATED, 1.0)
