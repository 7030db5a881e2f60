"""Which of a problem's traces join its group."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from pydantic import PositiveInt, model_validator

from luffy.errors import UserError
from luffy.objectives.base import Options
from luffy.sections import NonNegative

if TYPE_CHECKING:
    from luffy.data import Example


class TraceOptions(Options):
    """Of objectives that are shown traces: which of a problem's."""

    traces: PositiveInt = 1
    """Traces of a problem that join its group, at most."""
    trace_choice: Literal["first", "random", "shortest", "longest", "likely", "unlikely", "curriculum"] = "first"
    """Which of them, where a problem has more: as they come; drawn anew each time; by their tokens; by their perplexity
    under the policy as it is, lowest or highest; `curriculum`: by tokens, short ones at first, long ones at last."""
    trace_tokens: PositiveInt | None = None
    """Tokens that the chosen ones may have together; one that does not fit is passed over. null: any number."""
    trace_right: bool = False
    """Only those that pass the verifier: with `shortest`, the shortest right one."""
    trace_per_teacher: PositiveInt | None = None
    """Of one teacher's, at most so many; null: any number."""
    teacher_weights: dict[str, NonNegative] = {}
    """Teacher -> how often its traces are drawn, relative to others (which have 1), with `trace_choice = "random"`; 0:
    never, whatever the choice."""

    @property
    def shown(self) -> int:
        return self.traces

    @model_validator(mode="after")
    def _weights_are_used(self) -> Self:
        uneven = {teacher: weight for teacher, weight in self.teacher_weights.items() if weight not in (0.0, 1.0)}
        if uneven and self.trace_choice != "random":
            raise ValueError(
                f'teacher_weights other than 0 need trace_choice = "random", got {uneven} with "{self.trace_choice}"'
            )
        return self


class TracesAside(TraceOptions):
    """Of objectives with which no trace is a row of a group."""

    @property
    def shown(self) -> int:
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a choice may depend on beside the options. progress: the share of the run's steps that is over."""

    seed: int = 0
    progress: float = 0.0
    right: Sequence[bool] | None = None
    """Of each trace, whether it passes the verifier; only `trace_right` asks."""
    logp: Sequence[float] | None = None
    """Of each trace, the policy's mean log-prob of a token; only `likely` and `unlikely` ask."""


def allowed(example: Example, options: TraceOptions) -> list[int]:
    """Numbers of the traces that no limit or weight forbids by itself."""
    most = options.trace_tokens or math.inf
    weights = options.teacher_weights
    return [
        at
        for at, trace in enumerate(example.traces)
        if len(trace) <= most and weights.get(example.teachers[at], 1.0) > 0
    ]


def may_choose(example: Example, options: TraceOptions) -> list[int]:
    """All that `choose` may give, whatever is known."""
    fixed = not options.trace_right and options.trace_choice in ("first", "shortest", "longest")
    return choose(example, options, Known()) if fixed else allowed(example, options)


def only_by(options: TraceOptions, choices: tuple[str, ...]) -> None:
    """Refuse options that ask for what is not known when this objective takes a trace.

    Raises:
        ValueError: the choice is not among `choices`, or depends on the verifier.
    """
    if options.trace_right or options.trace_choice not in choices:
        raise ValueError(
            f"{options.name} takes a trace after its rollouts are graded: trace_right must be false and trace_choice "
            f"among {', '.join(choices)}, got {options.trace_right} and {options.trace_choice!r}"
        )


def refuse_without(examples: list[Example], options: TraceOptions) -> None:
    """Refuse data that the options leave nothing of.

    Raises:
        UserError: none of the problems has a trace that may be taken, or a weight is of nobody's.
    """
    teachers = {teacher for example in examples for teacher in example.teachers}
    if unknown := sorted(set(options.teacher_weights) - teachers):
        known = ", ".join(sorted(filter(None, teachers))) or "of nobody by name"
        raise UserError(f"objective: teacher_weights names {unknown[0]!r}, and the data have traces {known}")
    if any(may_choose(example, options) for example in examples):
        return
    some = sum(bool(example.traces) for example in examples)
    advice = (
        f"{some} have traces, which objective.trace_tokens or objective.teacher_weights exclude: change these"
        if some
        else "bring data with traces (target), raise data.max_trace_tokens, or choose another one"
    )
    raise UserError(
        f"objective: {options.name} learns from traces, and none of the {len(examples)} problems has one that it may "
        f"take; {advice}"
    )


def choose(example: Example, options: TraceOptions, known: Known) -> list[int]:
    """Numbers of the traces of a problem that join its group, in the order of the choice."""
    candidates = allowed(example, options)
    if options.trace_right and known.right is not None:
        candidates = [at for at in candidates if known.right[at]]
    most, left = options.traces, options.trace_tokens or math.inf
    found: list[int] = []
    for at in _in_order(candidates, example, options, known):
        teacher, size = example.teachers[at], len(example.traces[at])
        theirs = sum(example.teachers[other] == teacher for other in found)
        if len(found) < most and size <= left and theirs < (options.trace_per_teacher or math.inf):
            found.append(at)
            left -= size
    return found


def _in_order(candidates: list[int], example: Example, options: TraceOptions, known: Known) -> list[int]:
    def tokens(at: int) -> int:
        return len(example.traces[at])

    match options.trace_choice:
        case "random":
            # the order of u^(1/w), largest first, is a draw by weights without replacement (Efraimidis and Spirakis)
            rng = random.Random(known.seed)
            weights = [options.teacher_weights.get(example.teachers[at], 1.0) for at in candidates]
            keys = {at: rng.random() ** (1 / weight) for at, weight in zip(candidates, weights, strict=True)}
            return sorted(candidates, key=keys.__getitem__, reverse=True)
        case "shortest" | "longest":
            return sorted(candidates, key=tokens, reverse=options.trace_choice == "longest")
        case "likely" | "unlikely":
            if known.logp is None:
                return candidates
            return sorted(candidates, key=known.logp.__getitem__, reverse=options.trace_choice == "likely")
        case "curriculum":
            by_tokens = sorted(candidates, key=tokens)
            first = max(0, min(int(known.progress * len(by_tokens)), len(by_tokens) - options.traces))
            return by_tokens[first:] + by_tokens[:first][::-1]
    return candidates
