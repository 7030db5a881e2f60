"""The columns to write by hand: prompt (a text, or chat turns), answer (a text, or a list of accepted ones), and
optionally traces (a list of texts).
"""

from luffy.data.columns import Row, answers, asked, distinct, text, texts, turns
from luffy.data.problem import Problem


def read_plain(row: Row, *, name: str, number: int, where: str) -> Problem:
    is_text = isinstance(row.get("prompt"), str)
    return Problem(
        id=f"{name}/{number}",
        data_source=text(row, "data_source", where) or name,
        messages=(asked if is_text else turns)(row, "prompt", where),
        answer=answers(row, "answer", where),
        traces=distinct(texts(row, "traces", where)),
    )
