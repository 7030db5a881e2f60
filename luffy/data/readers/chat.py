"""Chat data sets: messages (list of {role, content}), and optionally answer."""

from luffy.data.columns import Row, answers, distinct, text, turns
from luffy.data.problem import DataError, Problem
from luffy.rewards.latex import last_boxed


def read_chat(row: Row, *, name: str, number: int, where: str) -> Problem:
    """A last assistant turn is the trace, what is before it the prompt. Gold is the answer, or the trace's last
    `\\boxed{}`. Raises DataError where no turn of the user comes before the trace."""
    messages = turns(row, "messages", where)
    trace = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not prompt or prompt[-1]["role"] != "user":
        raise DataError(f"{where}: column 'messages' must hold a user turn before the last assistant turn")
    return Problem(
        id=f"{name}/{number}",
        data_source=text(row, "data_source", where) or name,
        messages=prompt,
        answer=answers(row, "answer", where) or (last_boxed(trace) or "").strip(),
        traces=distinct([trace]),
    )
