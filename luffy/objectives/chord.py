"""CHORD (arXiv 2508.11408): imitation that fades, of tokens that the policy neither knows nor would never say.

    (1 - mu) GRPO of the rollouts  +  mu phi (-log p) of the traces,    phi = sg(p (1 - p)),  a mean over trace tokens

mu rises linearly to its peak over `warmup` of the steps, then falls along a cosine to its valley. Without `phi` it is
CHORD-mu. Criterion: the mean reward of rollouts rises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from luffy.objectives.guided import IMITATED, Guided, GuidedOptions
from luffy.objectives.prefixed import cosine
from luffy.sections import Fraction, Positive

if TYPE_CHECKING:
    from luffy.groups import Group
    from luffy.objectives.base import Terms
    from luffy.objectives.looking import Seen
    from luffy.packing import MicroBatch


class Chord(Guided):
    class Options(GuidedOptions):
        name: Literal["chord"] = "chord"
        clip_low: Positive | None = 0.2
        clip_high: Positive | None = 0.2
        advantage_std: bool = True
        phi: bool = True
        """Weigh a trace's token by p (1 - p)."""
        mu_peak: Fraction = 0.5
        """Weight of imitation at its highest. Ours, as the next two: the paper tunes them."""
        mu_valley: Fraction = 0.05
        """The same at the run's end."""
        warmup: Fraction = 0.1
        """Share of the steps over which mu rises."""

    looks: ClassVar = "logp"

    def imitation(self, progress: float) -> float:
        o = self.options
        if progress < o.warmup:
            return o.mu_peak * progress / o.warmup
        done = (progress - o.warmup) / (1 - o.warmup) if o.warmup < 1 else 1.0
        return cosine(o.mu_peak, o.mu_valley, done)

    def terms(self, groups: list[Group], progress: float) -> Terms:
        terms = super().terms(groups, progress)
        for rows in terms.rows:
            for row in rows:
                row.weight *= 1.0 if row.loss_id == IMITATED else 1 - self.imitation(progress)
        if not (terms.entropy_coef or terms.kl_coef):
            terms.rows = [[row for row in rows if row.weight] for rows in terms.rows]  # mu is 0 in the first step
        return terms

    def weigh(self, micro: MicroBatch, seen: Seen) -> None:
        if self.options.phi:
            p = seen.logp.exp()
            micro.token_weight = micro.token_weight * (p * (1 - p)).where(micro.loss_id == IMITATED, 1.0)
