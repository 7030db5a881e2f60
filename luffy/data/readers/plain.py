"""The columns to write by hand: prompt (a text, or chat turns), answer (a text, or a list of accepted ones), and
optionally traces (a list of texts) and teachers (who wrote each).
"""

from luffy.data.columns import Row, answers, asked, conversation, first_of_equals, one_for_each, text, texts
from luffy.data.problem import Problem


def read_plain(row: Row, *, name: str, number: int, where: str) -> Problem:
    is_text = isinstance(row.get("prompt"), str)
    traces, teachers = texts(row, "traces", where), texts(row, "teachers", where)
    one_for_each("teachers", teachers, traces, where)
    kept = first_of_equals(traces)
    return Problem(
        id=f"{name}/{number}",
        data_source=text(row, "data_source", where) or name,
        messages=(asked if is_text else conversation)(row, "prompt", where),
        answer=answers(row, "answer", where),
        traces=tuple(traces[at] for at in kept),
        teachers=tuple(teachers[at] for at in kept if teachers),
    )
