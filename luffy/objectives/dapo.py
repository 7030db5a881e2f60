"""DAPO (arXiv 2503.14476): GRPO with a wider clip above, a mean over tokens, and long answers punished softly.

    reward + min(0, (after - |y|) / span), at least reward - 1      of an answer of |y| tokens (eq. 13; `after` is the
                                                                   paper's L_max - L_cache, `span` its L_cache)

Its dynamic sampling is `rollout.refill`. Criterion: the mean reward of rollouts rises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from luffy.objectives.grpo import Grpo, RatioOptions
from luffy.sections import Positive

if TYPE_CHECKING:
    from luffy.groups import Group


class Dapo(Grpo):
    class Options(RatioOptions):
        name: Literal["dapo"] = "dapo"
        clip_low: Positive | None = 0.2
        clip_high: Positive | None = 0.28
        advantage_std: bool = True
        overlong_after: PositiveInt | None = None
        """Tokens from which on a longer answer is worth less; null: length costs nothing. The paper: 16384."""
        overlong_span: PositiveInt = 4096
        """Tokens over which what it costs grows to 1."""

    def rewards(self, group: Group) -> list[float]:
        after, span = self.options.overlong_after, self.options.overlong_span
        if after is None:
            return super().rewards(group)
        return [row.reward - min(1.0, max(0.0, (len(row.token_ids) - after) / span)) for row in group.rows]
