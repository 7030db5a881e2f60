"""NuminaMath's columns: problem, solution, and in some of its releases answer."""

from luffy.data.columns import Row, answers, asked, distinct, scalars, text
from luffy.data.problem import Problem
from luffy.rewards.latex import last_boxed

NO_ANSWER = ("proof", "notfound")
"""What NuminaMath-1.5 writes where there is nothing to compare with."""


def read_numina(row: Row, *, name: str, number: int, where: str) -> Problem:
    """The solution is the trace. Gold is the answer, or without that column the solution's last `\\boxed{}`."""
    solution = text(row, "solution", where)
    answer = answers(row, "answer", where) or (last_boxed(solution) or "").strip()
    return Problem(
        id=f"{name}/{number}",
        data_source=text(row, "source", where) or name,
        messages=asked(row, "problem", where),
        answer="" if row.get("answer") in NO_ANSWER else answer,
        traces=distinct([solution]),
        extra=scalars(row, "source", "problem_type", "question_type"),
    )
