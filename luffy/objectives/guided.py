"""What objectives share that imitate traces beside learning from rollouts: a policy loss, and a likelihood that is a
mean over the update's trace tokens, whatever the policy loss is divided by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luffy.advantages import group_advantages
from luffy.objectives.base import Terms
from luffy.objectives.choice import TraceOptions
from luffy.objectives.grpo import Grpo, RatioOptions

if TYPE_CHECKING:
    from luffy_kernels.token_losses import TokenLoss

    from luffy.groups import Group, Row

ROLLOUT, IMITATED = 0, 1


class GuidedOptions(RatioOptions, TraceOptions):
    """Of rollouts as of `RatioOptions`, of traces as of `TraceOptions`."""


class Guided(Grpo):
    """Advantages of rollouts alone; traces are imitated with the weight that `imitation` says."""

    def token_losses(self) -> tuple[TokenLoss, ...]:
        from luffy_kernels.token_losses import nll

        return (*super().token_losses(), nll())

    def imitation(self, progress: float) -> float:
        """Weight of the mean negative log-likelihood of a trace token, nats."""
        raise NotImplementedError

    def imitated(self, group: Group) -> list[Row]:
        """Traces of a graded group that are."""
        return group.traces

    def learned(self, group: Group) -> list[Row]:
        """Rollouts of a graded group that have a policy loss."""
        return [row for row in group.rows if not row.is_trace]

    def assign(self, group: Group, progress: float) -> list[Row]:
        rollouts = self.learned(group)
        advantages = group_advantages([row.reward for row in rollouts], self.options.advantage_std)
        for row, advantage in zip(rollouts, advantages, strict=True):
            row.advantage, row.loss_id, row.weight = advantage, ROLLOUT, 1.0
        for row in (imitated := self.imitated(group)):
            row.advantage, row.loss_id, row.weight = 1.0, IMITATED, 1.0
        return self.alive(rollouts) + imitated

    def counted(self, group: Group) -> list[Row]:
        return self.learned(group)

    def terms(self, groups: list[Group], progress: float) -> Terms:
        terms = super().terms(groups, progress)
        imitated = [row for rows in terms.rows for row in rows if row.loss_id == IMITATED]
        tokens, weight = sum(len(row.token_ids) for row in imitated), self.imitation(progress)
        for row in imitated:
            row.weight = weight * terms.normalizer / tokens
        return terms
