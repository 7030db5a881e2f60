"""PPO with a value model (arXiv 1707.06347, eq. 7), as Open-Reasoner-Zero has it (arXiv 2503.24290; the configuration
of its repository): discount and lambda 1, no KL term, one update of the policy a step.

    loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),  r = pi / pi_old, a mean over tokens

A: generalised advantage estimation (arXiv 1506.02438, eq. 16) over an answer that is rewarded at its end. With discount
and lambda 1, A = reward - V(prefix), and the value model learns the reward. `normalise` brings the advantages of an
update to mean 0 and variance 1, as the published configuration has it.

Unverified: 0.2 for the clip, and a clip of the value loss, which there is none of here.
Criterion: the mean reward of rollouts rises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from luffy.objectives import base
from luffy.objectives.grpo import GroupOptions
from luffy.sections import Fraction, Positive

if TYPE_CHECKING:
    from luffy_kernels.token_losses import TokenLoss

    from luffy.groups import Group, Row


class Ppo(base.Objective):
    class Options(GroupOptions):
        name: Literal["ppo"] = "ppo"
        clip_low: Positive | None = 0.2
        """Clip of the ratio to the policy that sampled below, as a distance from 1; null: no clip."""
        clip_high: Positive | None = 0.2
        """The same above."""
        discount: Fraction = 1.0
        """Of a reward, for each token that it is away."""
        gae_lambda: Fraction = 1.0
        """1: what an answer is worth is its reward alone; below, the value model's opinion of its continuation too."""
        normalise: bool = True
        """Bring the advantages of an update's tokens to mean 0 and variance 1."""
        value_lr: Positive = 5e-6
        """Learning rate of the value model; schedule and all else are the policy's (`optim`)."""
        value_updates: PositiveInt = 1
        """Updates of the value model for each of the policy's, with as many parts of its rows."""

        @property
        def networks(self) -> tuple[str, ...]:
            return (*super().networks, "value")

    def token_losses(self) -> tuple[TokenLoss, ...]:
        from luffy_kernels.token_losses import policy_gradient

        return (policy_gradient(self.options.clip_low, self.options.clip_high),)

    def assign(self, group: Group, progress: float) -> list[Row]:
        from luffy.token_advantages import gae, give

        for row in group.rows:
            o, values = self.options, row.said["value"]
            advantages, row.returns = gae(row.reward, values, o.discount, o.gae_lambda)
            give(row, advantages)
            row.weight = 1.0
        return group.rows

    def terms(self, groups: list[Group], progress: float) -> base.Terms:
        from luffy.token_advantages import whiten

        terms = super().terms(groups, progress)
        if self.options.normalise:
            whiten([row for rows in terms.rows for row in rows])
        return terms
