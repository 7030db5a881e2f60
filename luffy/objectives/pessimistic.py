"""The ratio-free objective of arXiv 2605.28150: advantages, and a square that holds a row near those who sampled it.

    loss of a row = -A S + beta / 2 S^2,   S = sum over tokens of log pi / mu,   A = R - mean(group) + shift

Its gradient in every token's log-prob is -(A - beta S). The paper proposes a mean shifted by beta to be pessimistic;
its sign is inferred from the text and not verified: `shift` is 0 unless set. Criterion: the mean reward of rollouts
rises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from luffy.advantages import group_advantages
from luffy.objectives.grpo import ComparedOptions
from luffy.objectives.oapl import Oapl
from luffy.sections import Positive

if TYPE_CHECKING:
    from luffy.groups import Group, Row
    from luffy.objectives.looking import Seen
    from luffy.packing import MicroBatch


class Pessimistic(Oapl):
    class Options(ComparedOptions):
        name: Literal["pessimistic"] = "pessimistic"
        beta: Positive = 0.1
        """Ours."""
        shift: float = 0.0
        """Added to every advantage, in units of reward."""

    looks: ClassVar = "logp"
    corrects: ClassVar = True

    def assign(self, group: Group, progress: float) -> list[Row]:
        advantages = group_advantages([row.reward for row in group.rows], self.options.advantage_std)
        for row, advantage in zip(group.rows, advantages, strict=True):
            row.advantage, row.weight = advantage + self.options.shift, 1.0
        return group.rows

    def weigh(self, micro: MicroBatch, seen: Seen) -> None:
        from luffy.objectives.looking import moved, row_sums

        s = row_sums(moved(seen, micro.sampler_logp), micro)[micro.row].float()
        micro.advantages = micro.advantages - self.options.beta * s
