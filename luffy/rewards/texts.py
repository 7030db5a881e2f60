"""Graders of answers that are words: a letter among options, a given text, a pattern.

What counts is the final answer: the last `\\boxed{}`; else what follows the last "answer is" or "answer:"; else the
last line. A response without any of it scores 0.
"""

import re

from luffy.rewards.golds import Answer, golds_of
from luffy.rewards.latex import last_boxed

_ANNOUNCED = re.compile(r"answer\s*+(?:is\b(?:\s*+:)?|[:=])\s*+(?=\S)", re.IGNORECASE)
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")
_LETTER = re.compile(r"\(?([A-Za-z]|\d)\)?(?:[).:,]?\s*\Z|[).:,]\s|\s+[^A-Za-z0-9\s])")
_SEVERAL = re.compile(r"(?:\(?[A-Z]\)?[.:,/&]*(?:\s+(?:and|or)\b)?\s*){2,}\Z")
_LISTED = re.compile(
    r"\(?([A-Ja-j])\)?\s*(?:[/,&+;]|\\lor|\\vee|\bor\b|\band\b)+\s*(?:(?:or|and|maybe|perhaps)\s+)*"
    r"\(?[A-Ja-j]\)?(?![A-Za-z'])"
)
_DENIED = re.compile(
    r"(?:\\neg|\\lnot|(?i:not|neither|nor|except|(?:anything|any|all|none)\s+but)\b)\s*\(?[A-Za-z]\)?(?![A-Za-z])"
)
_WORDS = re.compile(r"(?<![A-Za-z0-9(])[AI](?=\s+(?!(?:or|and)\b)[a-z])")
_ALONE = re.compile(r"(?<![A-Za-z0-9])\(?([A-Z])\)?(?![A-Za-z0-9'])|\((\d)\)")


def final_answer(response: str) -> str:
    """What a response ends up saying; "" when it says nothing."""
    boxed = last_boxed(response)
    if boxed is not None:
        return _WRAPPED.sub(r"\1", boxed).strip()
    announced = list(_ANNOUNCED.finditer(response))
    if announced:
        return response[announced[-1].end() :].splitlines()[0].strip()
    lines = [line.strip() for line in response.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def grade_choice(response: str, answer: Answer) -> float:
    """1.0 when the final answer names the letter (or digit) of an accepted option, else 0.0.

    `(B)`, `B.`, `B) because`, `B, because`, `\\boxed{\\text{B}}` and "the answer is B" name B; several letters name
    none. A and I before a word in small letters are words.
    """
    golds = {_WRAPPED.sub(r"\1", gold).strip("$(). ").upper() for gold in golds_of(answer)}
    return float(choice_of(response) in golds - {""})


def choice_of(response: str) -> str:
    """The one letter (or digit) that the final answer names; "" for none, several, or one that it says it is not."""
    said = final_answer(response).strip("*$ ")
    if _SEVERAL.match(said) or _LISTED.match(said) or _DENIED.match(said):
        return ""
    match = _LETTER.match(said)
    letters = {match.group(1).upper()} if match else {a or b for a, b in _ALONE.findall(_WORDS.sub("", said))}
    return letters.pop() if len(letters) == 1 else ""


def grade_exact(response: str, answer: Answer) -> float:
    """1.0 when the final answer is an accepted one, letter by letter, less case, spaces and a full stop; else 0.0."""
    return float(_plain(final_answer(response)) in {_plain(gold) for gold in golds_of(answer)})


def grade_regex(response: str, answer: Answer) -> float:
    """1.0 when the whole of the final answer matches an accepted pattern (Python's `re`), else 0.0."""
    return float(any(re.fullmatch(gold, final_answer(response)) for gold in golds_of(answer)))


def _plain(text: str) -> str:
    return " ".join(text.strip().strip("*$").rstrip(".").split()).casefold()
