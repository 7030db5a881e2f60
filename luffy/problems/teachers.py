"""How teachers word a worked solution: a small table of styles, one of them long-winded.

A style turns steps into text and announces the answer. Every trace ends in its `\\boxed{answer}`, at most followed by
a full stop. Deliberately absent: mistakes (family.Pen) and who is drawn when (spec.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

VERBOSE = "verbose"


@dataclass(frozen=True, slots=True)
class Teacher:
    """work: steps -> text; closing: announces the answer, `{}` being the box; glue: what separates the two."""

    work: Callable[[Sequence[str]], str]
    closing: str
    glue: str


def _numbered(steps: Sequence[str]) -> str:
    return "\n".join(f"{i}) {step}" for i, step in enumerate(steps, start=1))


def _long_winded(steps: Sequence[str]) -> str:
    first, *rest = steps
    told = [f"Let me think about this carefully, one step at a time. First of all, we write {first}."]
    told += [f"Going on from there, the next thing we get is {step}." for step in rest]
    return " ".join([*told, f"Let me double check the last step: {steps[-1]}. Yes, that looks right."])


TEACHERS = {
    "terse": Teacher(lambda steps: ", ".join(steps) + ".", "The answer is {}.", " "),
    "lines": Teacher("\n".join, "{}", "\n"),
    "numbered": Teacher(_numbered, "So the answer is {}.", "\n"),
    "arrows": Teacher(" -> ".join, "{}", " -> "),
    VERBOSE: Teacher(_long_winded, "Therefore, after all these steps, the final answer is {}.", " "),
}


def write_trace(teacher: str, steps: Sequence[str], answer: str, *, think: bool = False) -> str:
    """The trace's text; with `think` the steps stand between think tags and the answer after them."""
    style = TEACHERS[teacher]
    closing = style.closing.format(f"\\boxed{{{answer}}}")
    if think:
        return f"<think>\n{style.work(steps)}\n</think>\n{closing}"
    return f"{style.work(steps)}{style.glue}{closing}"
