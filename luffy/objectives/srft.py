"""SRFT (arXiv 2506.19767): imitation and reinforcement in one step, weighted by how unsure the policy is.

    traces     0.5 e^-H (-log p)           H: the policy's mean entropy over the row's tokens, no gradient through it
               and as in LUFFY -A f(p), A from the whole group
    rollouts   right: 0.1 e^H (-log p)     wrong: log p

A trace has two losses, so it enters the model twice. The weights and what is published of the loss are as a survey
states them; we could not check them against the authors' code. The traces' policy loss is LUFFY's shaped one.
Criterion: the mean reward of rollouts rises, and so does the probability of traces.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, ClassVar, Literal

from luffy.advantages import group_advantages
from luffy.objectives.choice import TraceOptions
from luffy.objectives.grpo import ComparedOptions, Grpo
from luffy.sections import Positive

if TYPE_CHECKING:
    from luffy_kernels.token_losses import TokenLoss

    from luffy.groups import Group, Row
    from luffy.objectives.looking import Seen
    from luffy.packing import MicroBatch

ROLLOUT, GUIDED, IMITATED = 0, 1, 2


class Srft(Grpo):
    class Options(ComparedOptions, TraceOptions):
        name: Literal["srft"] = "srft"
        gamma: Positive = 0.1
        """Of the traces' policy loss, p / (p + gamma)."""
        imitation: Positive = 0.5
        """Weight of the traces' likelihood, times e^-H."""
        right: Positive = 0.1
        """Weight of the likelihood of right rollouts, times e^H."""
        wrong: Positive = 1.0
        """Weight of the likelihood of wrong ones, which falls."""

    looks: ClassVar = "entropy"

    def token_losses(self) -> tuple[TokenLoss, ...]:
        from luffy_kernels.token_losses import nll, reinforce, shaped

        return (reinforce(), shaped(self.options.gamma), nll())

    def assign(self, group: Group, progress: float) -> list[Row]:
        o = self.options
        advantages = group_advantages([row.reward for row in group.rows], o.advantage_std)
        found = []
        for row, advantage in zip(group.rows, advantages, strict=True):
            row.weight = 1.0
            if row.is_trace:
                row.advantage, row.loss_id = advantage, GUIDED
                again = copy(row)
                again.advantage, again.loss_id, again.weight = 1.0, IMITATED, o.imitation
                found += [row, again] if advantage else [again]
            else:
                row.loss_id, row.advantage = ROLLOUT, o.right if row.solved else -o.wrong
                found.append(row)
        return found

    def weigh(self, micro: MicroBatch, seen: Seen) -> None:
        from luffy.objectives.looking import row_lengths, row_sums

        assert seen.entropy is not None
        unsure = (row_sums(seen.entropy, micro) / row_lengths(micro))[micro.row].float()
        weight = (-unsure).exp().where(micro.loss_id == IMITATED, 1.0)
        weight = unsure.exp().where((micro.loss_id == ROLLOUT) & (micro.advantages > 0), weight)
        micro.token_weight = micro.token_weight * weight
