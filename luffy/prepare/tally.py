"""Counts of what each filter left out."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

PROBLEM_STEPS = {
    "without_answer": "without a verifiable answer",
    "in_complement": "also in the set to leave out",
    "prompt_too_long": "whose prompt is too long",
    "without_trace": "left without a trace",
    "repeated_question": "whose question was there before",
}
GENERATION_STEPS = {
    "empty": "empty",
    "marked_wrong": "marked wrong",
    "incomplete": "marked incomplete",
    "think_unclosed": "with a think tag that is never closed",
    "think_repeated": "with a think tag twice",
    "repeated": "equal to an earlier one of the problem",
    "too_long": "too long",
    "rejected": "not accepted by the verifier",
    "not_wanted": "beyond the number wanted",
    "of_repeated_question": "of a question that was there before",
}
NAMED = 3
"""Ids that are kept of what a step left out."""


@dataclass
class Tally:
    """Counts by step, `read` and `kept` among them: every problem is counted at one step, and so is every generation of
    a problem that came as far as its generations."""

    problems: Counter[str] = field(default_factory=Counter)
    generations: Counter[str] = field(default_factory=Counter)
    several_answers: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop_problem(self, step: str, id: str) -> None:
        self.problems[step] += 1
        self._name(step, id)

    def drop_generation(self, step: str, id: str) -> None:
        self.generations[step] += 1
        self._name(step, id)

    def add(self, other: Self) -> None:
        self.problems.update(other.problems)
        self.generations.update(other.generations)
        self.several_answers += other.several_answers
        for step, ids in other.examples.items():
            for id in ids:
                self._name(step, id)

    def _name(self, step: str, id: str) -> None:
        named = self.examples.setdefault(step, [])
        if len(named) < NAMED and id not in named:
            named.append(id)

    def record(self) -> dict[str, Any]:
        """In the order of the filters, zeros included."""
        return {
            "problems": _ordered(self.problems, PROBLEM_STEPS),
            "generations": _ordered(self.generations, GENERATION_STEPS),
            "several_answers": self.several_answers,
            "examples": {
                step: self.examples[step] for step in (*PROBLEM_STEPS, *GENERATION_STEPS) if step in self.examples
            },
        }

    @classmethod
    def of(cls, record: dict[str, Any]) -> Self:
        named = {step: list(ids) for step, ids in record["examples"].items()}
        return cls(Counter(record["problems"]), Counter(record["generations"]), record["several_answers"], named)

    def lines(self) -> Iterator[str]:
        """For people: what was read, what each filter left out, what is left."""
        for what, counts, steps in (
            ("problems", self.problems, PROBLEM_STEPS),
            ("generations", self.generations, GENERATION_STEPS),
        ):
            yield f"{counts['read']:9,} {what} read"
            for step, words in steps.items():
                if counts[step]:
                    yield f"{-counts[step]:9,} {words}, such as {', '.join(self.examples[step])}"
            yield f"{counts['kept']:9,} {what} kept"

    def __str__(self) -> str:
        steps = {**PROBLEM_STEPS, **GENERATION_STEPS}
        counts = {**self.problems, **self.generations}
        lost = ", ".join(f"{counts[step]} {steps[step]}" for step in steps if counts.get(step))
        return f"of {self.problems['read']} problems and {self.generations['read']} generations {lost or 'none'}"


def _ordered(counts: Counter[str], steps: Iterable[str]) -> dict[str, int]:
    return {step: counts[step] for step in ("read", *steps, "kept")}
