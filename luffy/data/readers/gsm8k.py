"""GSM8K: question, answer with a last line `#### gold` and calculator marks `<<1+1=2>>`."""

import re

from luffy.data.columns import Row, asked, typed
from luffy.data.problem import DataError, Problem

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_GOLD = re.compile(r"\n?####[ \t]*(\S[^\n]*?)\s*\Z")


def read_gsm8k(row: Row, *, name: str, number: int, where: str) -> Problem:
    """The gold loses its thousands commas, the trace its marks, and it ends in a boxed answer. Raises
    DataError where the answer ends in no gold."""
    solution = typed(row, "answer", str, "a string", where)
    gold = _GOLD.search(solution)
    if gold is None:
        raise DataError(f"{where}: column 'answer' must end in a line '#### <gold>', got {solution[-40:]!r}")
    answer = gold.group(1).replace(",", "")
    worked = _CALCULATOR.sub("", solution[: gold.start()]).rstrip()
    trace = f"{worked}\nThe answer is \\boxed{{{answer}}}.".lstrip("\n")
    return Problem(
        id=f"{name}/{number}",
        data_source="openai/gsm8k",
        messages=asked(row, "question", where),
        answer=answer,
        traces=(trace,),
    )
