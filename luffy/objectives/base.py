"""What an objective is.

    choose, rollouts    the traces of a problem that it is shown, and what to sample beside them
    terms               of the groups of one update, graded: which rows enter the model, their advantages, losses and
                        weights, and what the sum is divided by
    weigh               where `looks`: what depends on the policy's own log-probs or entropies, per micro-batch

Losses are summed over tokens. What they are divided by is known before the first backward: of the whole update,
whatever the micro-batches and ranks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import PositiveInt

from luffy.sections import Section

Ids = tuple[int, ...]

if TYPE_CHECKING:
    from luffy_kernels.token_losses import TokenLoss

    from luffy.data import Example
    from luffy.groups import Group, Row
    from luffy.objectives.looking import Seen
    from luffy.packing import MicroBatch


class Options(Section):
    """What every objective may be told; one's own come in a subclass."""

    name: str

    @property
    def sampled(self) -> int:
        """Rollouts of a problem that has as many traces as are wanted."""
        return 0

    @property
    def shown(self) -> int:
        """Traces of such a problem."""
        return 0


class TraceOptions(Options):
    """Of objectives that are shown traces: which of a problem's."""

    traces: PositiveInt = 1
    """Traces of a problem that join its group, at most."""
    trace_choice: Literal["first", "random", "shortest", "longest"] = "first"
    """Which of them, where a problem has more: as they come, drawn anew each time, or by their tokens."""
    trace_tokens: PositiveInt | None = None
    """Tokens that the chosen ones may have together; one that does not fit is passed over. null: any number."""

    @property
    def shown(self) -> int:
        return self.traces


@dataclass(slots=True, kw_only=True)
class Terms:
    """An update, as an objective wants it."""

    groups: list[Group]
    rows: list[list[Row]]
    """Of each group, those whose gradient is not zero by construction. The others never enter the model."""
    normalizer: float
    """What the summed loss is divided by."""
    entropy_coef: float
    """In units of that sum."""


class Objective:
    """Sums over rows of a group that `assign` describes; see the module."""

    Options: ClassVar[type[Options]] = Options
    looks: ClassVar[Literal["nothing", "logp", "entropy"]] = "nothing"
    """What of the policy's `weigh` needs, in a pass of its own before an update's: a third more arithmetic."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.losses: tuple[TokenLoss, ...] = self.token_losses()

    def token_losses(self) -> tuple[TokenLoss, ...]:
        """Indexed by a row's `loss_id`."""
        raise NotImplementedError

    def rollouts(self, traces: int) -> int:
        """To sample for a problem that is shown so many traces; one that lacks some gets a rollout for each."""
        return self.options.sampled + self.options.shown - traces

    def choose(self, example: Example, seed: int) -> list[Ids]:
        """The traces of a problem that join its group, as token ids. The same for the same seed."""
        most, left = self.options.shown, getattr(self.options, "trace_tokens", None) or math.inf
        found: list[Ids] = []
        for trace in self._in_order(example.traces, seed):
            if len(found) < most and len(trace) <= left:
                found.append(trace)
                left -= len(trace)
        return found

    def may_choose(self, example: Example) -> list[Ids]:
        """All that `choose` may give, whatever the seed."""
        if getattr(self.options, "trace_choice", "first") != "random":
            return self.choose(example, 0)
        most = self.options.trace_tokens or math.inf
        return [trace for trace in example.traces if len(trace) <= most]

    def _in_order(self, traces: Sequence[Ids], seed: int) -> list[Ids]:
        choice = getattr(self.options, "trace_choice", "first")
        if choice == "random":
            return random.Random(seed).sample(traces, len(traces))
        return list(traces) if choice == "first" else sorted(traces, key=len, reverse=choice == "longest")

    def assign(self, group: Group, progress: float) -> list[Row]:
        """Fill `advantage`, `loss_id` and `weight` of the rows, rewards being known; returns those that enter the
        model. progress: the share of the run's steps that is over."""
        raise NotImplementedError

    def counted(self, group: Group) -> list[Row]:
        """Rows that the loss is a mean over, where it is one: also those that `assign` leaves out because their
        gradient is zero."""
        return group.rows

    def terms(self, groups: list[Group], progress: float) -> Terms:
        """Of the groups of one update, of all ranks. Divides as `GroupOptions` says; without them by the tokens."""
        rows = [self.assign(group, progress) for group in groups]
        counted = [row for group in groups for row in self.counted(group)]
        tokens = sum(len(row.token_ids) for row in counted)
        chosen = getattr(self.options, "normalizer", "tokens")
        if chosen == "sequences":
            for row in counted:
                row.weight /= len(row.token_ids)
        normalizer = float({"tokens": tokens, "sequences": len(counted)}[chosen] if isinstance(chosen, str) else chosen)
        normalizer = normalizer or 1.0
        entropy_coef = getattr(self.options, "entropy_coef", 0.0) * normalizer / max(tokens, 1)
        return Terms(groups=groups, rows=rows, normalizer=normalizer, entropy_coef=entropy_coef)

    def weigh(self, micro: MicroBatch, seen: Seen) -> None:
        """Change `token_weight` and `advantages` of a micro-batch by what the policy itself says. Where ranks share its
        tokens, all of them are here."""
