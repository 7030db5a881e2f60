"""Whether a trace's think tags are as a model must learn them: opened once, closed once."""

from typing import Literal

OPEN, CLOSE = "<think>", "</think>"


def think_fault(text: str, *, opened: bool = False) -> Literal["", "repeated", "unclosed"]:
    """What is wrong with a trace's tags, or "".

    opened: the prompt ends in `<think>` and a newline, which `PromptTemplate` then leaves out of the trace.
    A text without tags is no fault here: not every teacher thinks aloud.
    """
    if opened:
        text = OPEN + text.removeprefix(f"{OPEN}\n") if CLOSE in text or OPEN in text else text
    if text.count(OPEN) > 1 or text.count(CLOSE) > 1:
        return "repeated"
    return "unclosed" if OPEN in text and CLOSE not in text else ""
