"""OpenR1-Math-220k as it is published: problem, answer, generations (list of DeepSeek-R1's answers), and for each of
them correctness_math_verify and is_reasoning_complete (lists of booleans, nulls among them).
"""

from dataclasses import dataclass

from luffy.data.columns import Row, answers, asked, distinct, scalars, texts, wrong_type
from luffy.data.problem import DataError, Problem

RIGHT, COMPLETE = "correctness_math_verify", "is_reasoning_complete"
TEACHER = "DeepSeek-R1"


@dataclass(frozen=True, slots=True)
class Generation:
    """A text, and what its source says of it; what it says nothing of counts as true.

    teacher: who wrote it, "" where nobody says.
    """

    text: str
    right: bool = True
    complete: bool = True
    teacher: str = ""


def read_openr1(row: Row, *, name: str, number: int, where: str) -> Problem:
    """Generations marked right and complete are the traces."""
    traces = distinct(one.text for one in generations(row, where) if one.right and one.complete)
    return Problem(
        id=f"{name}/{row.get('uuid') or number}",
        data_source="openr1",
        messages=asked(row, "problem", where),
        answer=answers(row, "answer", where),
        traces=traces,
        teachers=(TEACHER,) * len(traces),
        extra=scalars(row, "uuid", "source", "problem_type", "question_type"),
    )


def generations(row: Row, where: str) -> list[Generation]:
    """All of a row's. A mark that is null, like a list of marks that is, counts as false; only an absent column says
    nothing."""
    found = row.get("generations") or []
    if isinstance(found, list):
        found = ["" if text is None else text for text in found]
    found = texts({"generations": found}, "generations", where)
    right, complete = (_marks(row, column, len(found), where) for column in (RIGHT, COMPLETE))
    return [Generation(*one, teacher=TEACHER) for one in zip(found, right, complete, strict=True)]


def _marks(row: Row, column: str, count: int, where: str) -> list[bool]:
    if column not in row:
        return [True] * count
    marks = row[column]
    if marks is None:
        return [False] * count
    if not isinstance(marks, list):
        raise wrong_type(column, "a list of booleans", marks, where)
    if len(marks) != count:
        raise DataError(f"{where}: column {column!r} must mark each of {count} generations, got {len(marks)} marks")
    return [mark is True for mark in marks]
