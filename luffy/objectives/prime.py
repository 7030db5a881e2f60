"""PRIME (arXiv 2502.01456): process rewards that a reward model learns from outcomes alone, as the policy learns.

    r(t) = beta (log phi - log reference) of token t                              the implicit process reward, eq. 3
    A(t) = process_coef x sum over s >= t of discount^(s - t) (r_i(s) - mean over j != i of the mean r_j)
         + outcome_coef x (R_i - mean over j != i of R_j)                                  leave-one-out, eq. 5
    loss = max(-A pi/pi_old, -A clip(pi/pi_old)), a mean over tokens

phi is a network of its own that learns each step's outcomes by cross-entropy (`luffy.networks.implicit_reward`), before
it says the step's rewards. Groups whose mean reward lies outside the band teach neither it nor the policy. The
published code, not the paper, divides process rewards by the largest sum of an update (`process_norm`: a phi that knows
nothing yet then weighs as much as the outcomes do; docs/objectives.md) and brings the advantages of an update to mean 0
and variance 1 (`normalise`).

Left out: the published code gives an answer's last token no process reward, and takes a token's own r in the place of
its answer's mean when it leaves an answer out of the baseline.
Criterion: the mean reward of rollouts rises.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Literal

from luffy.objectives import base
from luffy.objectives.grpo import GroupOptions
from luffy.sections import Fraction, NonNegative, Positive

if TYPE_CHECKING:
    from luffy_kernels.token_losses import TokenLoss
    from torch import Tensor

    from luffy.groups import Group, Row

EPS = 1e-6


class Prime(base.Objective):
    class Options(GroupOptions):
        name: Literal["prime"] = "prime"
        clip_low: Positive | None = 0.2
        """Clip of the ratio to the policy that sampled below, as a distance from 1; null: no clip."""
        clip_high: Positive | None = 0.2
        """The same above."""
        beta: Positive = 0.05
        """Reward of a nat that phi adds to the reference's log-prob."""
        discount: Fraction = 1.0
        """Of a process reward, for each token that it is away."""
        process_coef: NonNegative = 1.0
        """Weight of process rewards in an advantage."""
        outcome_coef: NonNegative = 1.0
        """Weight of the outcome in it."""
        process_norm: bool = False
        """Divide process rewards by the largest sum of later ones in the update."""
        normalise: bool = True
        """Bring the advantages of an update's tokens to mean 0 and variance 1."""
        accuracy_low: Fraction = 0.2
        """Groups of a lower mean reward are left out."""
        accuracy_high: Fraction = 0.8
        """The same of a higher one."""
        reward_lr: Positive = 1e-6
        """Learning rate of phi; schedule and all else but the next are the policy's (`optim`)."""
        reward_max_grad_norm: Positive = 10.0
        """As `optim.max_grad_norm`, of phi."""
        reward_update: Literal["before", "after"] = "before"
        """phi learns a step's outcomes before it says the step's rewards, as the authors' recipe in verl has it, or
        after the policy has learned, as their first scripts have it: then nothing of the step is in its rewards."""

        @property
        def networks(self) -> tuple[str, ...]:
            return ("reference", "implicit_reward")

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.scale = 1.0

    def token_losses(self) -> tuple[TokenLoss, ...]:
        from luffy_kernels.token_losses import policy_gradient

        return (policy_gradient(self.options.clip_low, self.options.clip_high),)

    def judged(self, group: Group) -> list[Row]:
        o = self.options
        if len(group.rows) < 2:
            return []
        return group.rows if o.accuracy_low <= fmean(row.reward for row in group.rows) <= o.accuracy_high else []

    def counted(self, group: Group) -> list[Row]:
        return self.judged(group)

    def assign(self, group: Group, progress: float) -> list[Row]:
        from luffy.token_advantages import give, to_go

        o, rows = self.options, self.judged(group)
        process = [self.process(row) / self.scale for row in rows]
        means, total = [r.mean().item() for r in process], sum(row.reward for row in rows)
        others = max(len(rows) - 1, 1)
        for row, r, mean in zip(rows, process, means, strict=True):
            outcome = row.reward - (total - row.reward) / others
            later = to_go(r - (sum(means) - mean) / others, o.discount)
            give(row, o.process_coef * later + o.outcome_coef * outcome)
            row.weight = 1.0
        return rows

    def process(self, row: Row) -> Tensor:
        """[n] float64, of each token."""
        return self.options.beta * (row.said["implicit_reward"].double() - row.said["reference"].double())

    def terms(self, groups: list[Group], progress: float) -> base.Terms:
        from luffy.token_advantages import to_go, whiten

        rows = [row for group in groups for row in self.judged(group)]
        if self.options.process_norm:
            self.scale = max((to_go(self.process(row)).abs().max().item() for row in rows), default=0.0) + EPS
        terms = super().terms(groups, progress)
        if self.options.normalise:
            whiten(rows)
        return terms
