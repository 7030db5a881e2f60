"""What a problem family is: how to draw a question, and how a teacher works it out step by step.

A family is three pure functions and its difficulty ranges. `draw` turns knob values into parameters, `ask` turns
parameters into the question, and `solve` writes the steps with a `Pen`. Every intermediate result passes through the
pen, so a teacher's slip is made in one place and carries through the later steps to a wrong answer, as a real
mistake does.

Deliberately absent: wording styles (teachers.py), splits and counts (spec.py).
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Params = tuple[int, ...]
Range = tuple[int, int]
Solution = tuple[list[str], str]


@dataclass
class Pen:
    """Notes down intermediate results; at the `slip_at`-th one it is off by `delta` (and never below zero)."""

    slip_at: int | None = None
    delta: int = 0
    written: int = 0

    def __call__(self, value: int) -> int:
        at, self.written = self.written, self.written + 1
        if at != self.slip_at:
            return value
        # A negative quotient or remainder would look like another procedure, and floor division of -1 never ends.
        return value + self.delta if value + self.delta >= 0 else value - self.delta


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of problem.

    knobs: inclusive range of each difficulty knob in training; the first knob is the difficulty.
    ood: inclusive range of the first knob out of distribution; its low end lies above the training range.
    draw: (rng, knob values) -> parameters. The first knob can be read back from the parameters, so a harder
        question is never also an easier one.
    ask: parameters -> question text. solve: (parameters, pen) -> (steps, answer).
    key: parameters -> canonical parameters; questions that differ only by order share a key, hence a split.
    """

    name: str
    knobs: Mapping[str, Range]
    ood: Range
    draw: Callable[[random.Random, Mapping[str, int]], Params]
    ask: Callable[[Params], str]
    solve: Callable[[Params, Pen], Solution]
    key: Callable[[Params], Params] = lambda params: params

    @property
    def difficulty(self) -> str:
        """Name of the knob that grows out of distribution."""
        return next(iter(self.knobs))


def integer(rng: random.Random, low: int, high: int) -> int:
    """A uniform integer in [low, high]; only `random()` is stable across Python versions, so nothing else is used."""
    return low + int(rng.random() * (high - low + 1))


def number(rng: random.Random, digits: int) -> int:
    """A uniform integer of exactly `digits` decimal digits; one-digit numbers are 1 to 9."""
    return integer(rng, 10 ** (digits - 1), 10**digits - 1)


def solve_wrong(family: Family, params: Params, rng: random.Random) -> Solution:
    """A worked solution with one slip that reaches the answer: never the right answer."""
    truth_pen = Pen()
    _, truth = family.solve(params, truth_pen)
    slips = [(step, delta) for step in range(truth_pen.written) for delta in (1, -1, 2, -2, 10)]
    while slips:
        step, delta = slips.pop(integer(rng, 0, len(slips) - 1))
        steps, answer = family.solve(params, Pen(step, delta))
        if answer != truth:
            return steps, answer
    raise AssertionError(f"{family.name}: no slip changes the answer of {params}")
