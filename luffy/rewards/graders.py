"""Graders: pure functions (response text, answer) -> reward in [0, 1]. An answer may be several accepted ones.

    train    LUFFY's reward version 3: needs `</think>`, grades what stands between the first and a second one
    answer   LUFFY's reward version 4: the whole response; no box is required
    boxed    for evaluation: the last `\\boxed{}` of the response by any of three tests, and 0 without one (`strict`)
    deepscaler, deepscaler_v0, deepscaler_v1   LUFFY's reward versions 2, 0 and 1 (`strict`); v1 also gives -0.5 and -1
    number   the last number written, in the last box if there is one; for answers that are plain numbers
    choice, exact, regex   of words (`texts`)    code   of programs (`code`)    gym   of reasoning-gym's tasks (`gym`)

`train`, `answer` and the last test of `boxed` compare with math-verify, gold first, and a verdict counts only if it
`is True`. math-verify's own timeouts are alarms that need a main thread and cannot stop C code: they are off, the
pool's wall clock stands in. Deliberately absent: length rewards.

A change that may alter a verdict raises the grader's number in `VERSIONS`; results name it (`label`).
"""

import functools
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from importlib.metadata import entry_points
from typing import Any

from luffy.rewards.code import grade_code
from luffy.rewards.golds import Answer, golds_of
from luffy.rewards.gym import MISSING, grade_gym
from luffy.rewards.latex import last_boxed
from luffy.rewards.strict import THINK_END, grade_boxed, grade_deepscaler, grade_deepscaler_v0, grade_deepscaler_v1
from luffy.rewards.texts import grade_choice, grade_exact, grade_regex

Grader = Callable[[str, Answer], float]

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,11}")
_BOXED_INTEGER = re.compile(r"\\boxed\{(0|-?[1-9][0-9]{0,11})\}")
_ANNOUNCED = re.compile(r"(?i:final answer)")
_NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")
_DIGIT = re.compile(r"\d")
_LATEX = re.compile(r"[$\\\[]")


def grade_train(response: str, answer: Answer) -> float:
    """1.0 when the text after the first `</think>` (up to a second one) holds the answer, else 0.0."""
    parts = response.split(THINK_END)
    return 0.0 if len(parts) < 2 else grade_answer(parts[1], answer)


def grade_answer(response: str, answer: Answer) -> float:
    """1.0 when math-verify finds an accepted answer in the response, else 0.0."""
    golds = golds_of(answer)
    verdict = shortcut(response, golds)
    if verdict is None:
        verdict = echoes(response, golds) or symbolic(response, golds)
    return float(verdict)


def grade_number(response: str, answer: Answer) -> float:
    """1.0 when the last number is an accepted answer, else 0.0; a last `\\boxed{}` must hold it and nothing else.

    math-verify takes an expression that equals the answer for the answer: asked for the sum of the digits of 6067, the
    unfinished "6 + 0 + 6 + 7 =" scores 1. Where the question is to work an expression out, that is no answer.
    """
    golds = golds_of(answer)
    if "\\boxed{" in response:
        boxed = (last_boxed(response) or "").strip()  # a box that never closes is no answer
        given = boxed if _NUMBER.fullmatch(boxed) else None
    else:
        given = next(reversed(_NUMBER.findall(response)), None)
    return float(given is not None and any(_equal(given, gold) for gold in golds))


def _equal(number: str, gold: str) -> bool:
    gold = gold.strip().strip("$")
    return bool(_NUMBER.fullmatch(gold)) and Decimal(gold.replace(",", "")) == Decimal(number.replace(",", ""))


def shortcut(response: str, golds: Sequence[str]) -> bool | None:
    """math-verify's verdict where it is certain without symbolic work, None elsewhere.

    Certain negatives: a response with no digit and no LaTeX opener has nothing that math-verify extracts.
    Certain verdicts: every gold is a plain integer, the response's only braces and only backslash belong to one
    `\\boxed{integer}`, nothing else could open LaTeX, and no "final answer" pattern ranks above the box. Then the box
    is the one match at its priority, and integers are compared exactly.
    """
    if not _DIGIT.search(response) and not _LATEX.search(response):
        return False
    if not all(_INTEGER.fullmatch(gold) for gold in golds):
        return None
    if response.count("\\") != 1 or response.count("{") != 1 or response.count("}") != 1:
        return None
    if "$" in response or "[" in response or _ANNOUNCED.search(response):
        return None
    box = _BOXED_INTEGER.search(response)
    return None if box is None else box.group(1) in golds


def echoes(response: str, golds: Sequence[str]) -> bool:
    """Whether the one box of a response, which has no LaTeX beside it, holds a gold letter by letter.

    math-verify reads the box as it reads the gold, and takes it for equal if it can read it at all.
    """
    if response.count("\\boxed{") != 1 or _ANNOUNCED.search(response):
        return False
    said = last_boxed(response)
    if said is None or said not in golds or "$" in said:
        return False
    around = response.replace(f"\\boxed{{{said}}}", "", 1)
    return not _LATEX.search(around) and bool(_parse_gold(said))


def symbolic(response: str, golds: Sequence[str]) -> bool:
    """math-verify on the whole text: default extraction, gold wrapped in dollars and passed first."""
    from math_verify import parse, verify

    prediction = parse(response, parsing_timeout=None)
    return any(verify(_parse_gold(gold), prediction, timeout_seconds=None) is True for gold in golds)


@functools.lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> list[Any]:
    from math_verify import parse

    return parse(f"${gold}$", parsing_timeout=None)


def warm_up() -> None:
    """Import math-verify and build its regexes now, so that the first answer's clock does not pay for them."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once that its timeouts are off
    symbolic("so x is $\\frac{1}{2}$", ("0.5",))


SYMBOLIC: dict[str, Grader] = {
    "train": grade_train,
    "answer": grade_answer,
    "boxed": grade_boxed,
    "deepscaler": grade_deepscaler,
    "deepscaler_v0": grade_deepscaler_v0,
    "deepscaler_v1": grade_deepscaler_v1,
}
GRADERS: dict[str, Grader] = SYMBOLIC | {
    "number": grade_number,
    "choice": grade_choice,
    "exact": grade_exact,
    "regex": grade_regex,
    "code": grade_code,
    "gym": grade_gym,
}
VERSIONS = dict.fromkeys(GRADERS, 1) | dict.fromkeys(("deepscaler", "deepscaler_v0", "deepscaler_v1"), 3) | {"boxed": 4}
ENTRY_POINTS = "luffy.graders"


def label(name: str) -> str:
    """A grader and its version, as results name it: `boxed-4`. One of somebody else's is its name alone."""
    return f"{name}-{VERSIONS[name]}" if name in VERSIONS else name


def find_grader(name: str) -> Grader:
    """The grader called `name`, here or by an installed package (entry point `luffy.graders`), or the function at an
    import path `module:function`.

    The module is looked for in the working directory too, after everything that is installed.

    Raises:
        ValueError: there is none of this name.
        Exception: whatever importing the module raises.
    """
    if name == "gym":
        try:
            importlib.import_module("reasoning_gym")  # now, so that no answer's clock pays for it
        except ImportError as error:
            raise ValueError(f"grader 'gym': {MISSING}") from error
    if name in GRADERS:
        return GRADERS[name]
    module, _, function = name.partition(":")
    if not function:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            return entry.load()
    if not (module and function):
        raise ValueError(f"grader must be among {', '.join(GRADERS)} or 'module:function', got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    found = getattr(importlib.import_module(module), function, None)
    if not callable(found):
        raise ValueError(f"grader {name!r}: module {module} has no function {function!r}")
    return found
