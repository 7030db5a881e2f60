"""The graders that want a box: an answer is right if one of several tests says so.

    boxed       for evaluation, the three tests that LUFFY's second version has ("oat" grader): the same text
                (`latex.normal`), the same expression (`same_expression`), or math-verify, box against box
    deepscaler  the first two alone (agentica's DeepScaleR), LUFFY's reward versions 0 to 2

Written after their description; where they differ from the originals the docstrings say so.
"""

import re
import string
import zlib
from dataclasses import replace
from decimal import Decimal
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from luffy.rewards.arithmetic import read
from luffy.rewards.beside import contradict, is_word, other_line
from luffy.rewards.decimals import large, repeated, written_out
from luffy.rewards.golds import Answer, golds_of
from luffy.rewards.intervals import as_interval, is_interval
from luffy.rewards.latex import (
    bare,
    braced,
    fractions,
    has_letters,
    last_boxed,
    normal,
    roots,
    together,
    unicode_free,
    unnamed,
    whole,
    without_letter,
    without_unit,
    without_words,
    words,
)

if TYPE_CHECKING:
    from latex2sympy2_extended import NormalizationConfig

THINK_END = "</think>"

_MIXED = re.compile(r"(?<![\d.])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}|(?<![\d.])(\d+)\s+(\d+)/(\d+)")
_INTEGER = re.compile(r"[+-]?\d+")
_FRACTION = re.compile(r"[+-]?\(*[+-]?\d+\)*/\(*\d+\)*")
_WORDS = re.compile(r"\s*,?\s*\b(?:and|or)\b\s*")
_LETTERS = re.compile(r"[a-zA-Z]")
_WHOLE_WORD = re.compile(r"\\(?:text|mbox|mathrm)\s*\{[^{}]*\}|\\[a-zA-Z]+|[a-zA-Z]{4,}")
_OR_LETTER = re.compile(rf"{_WHOLE_WORD.pattern}|[A-Z]")
OPENING, CLOSING = "([", ")]"
MOST_LETTERS = 2
LONG, REPETITIVE = 128, 0.3
LONGEST_ANSWER = 2000
"""Of an answer that is more than a text, characters; the longest gold of the benchmarks has 300."""


def grade_boxed(response: str, answer: Answer) -> float:
    """1.0 when the last `\\boxed{}` (or `\\fbox{}`) of the response holds an accepted answer, else 0.0."""
    said = box_of(response)
    return 0.0 if said is None else float(any(same(said, gold) for gold in golds_of(answer)))


def grade_deepscaler(response: str, answer: Answer) -> float:
    """Version 2: 1.0 when the last box holds an accepted answer, in what follows a `</think>` if there is one."""
    return float(_solved(response if THINK_END in response else THINK_END + response, answer) is True)


def grade_deepscaler_v0(response: str, answer: Answer) -> float:
    """Version 0: as version 2, but without `</think>` nothing is right."""
    return float(_solved(response, answer) is True)


def grade_deepscaler_v1(response: str, answer: Answer) -> float:
    """Version 1: 1.0 right, -0.5 wrong, -1.0 without `</think>`, box or usable answer."""
    solved = _solved(response, answer)
    return -1.0 if solved is None else 1.0 if solved else -0.5


def _solved(response: str, answer: Answer) -> bool | None:
    """None: there is nothing to compare."""
    parts = response.split(THINK_END)
    said = box_of(parts[1]) if len(parts) > 1 else None
    golds = [unboxed(gold) for gold in golds_of(answer) if gold.strip()]
    if said is None or not golds:
        return None
    said = unboxed(said)
    return any(same_text(said, gold) or (len(said) <= LONGEST_ANSWER and same_expression(said, gold)) for gold in golds)


def box_of(response: str) -> str | None:
    """Content of the last box, None without one."""
    said = last_boxed(response)
    if said is None and (start := response.rfind("\\fbox{")) >= 0:
        said = braced(response, start + len("\\fbox"))
    return said


def unboxed(gold: str) -> str:
    """What stands in a gold's box, if it has one; numpy's names (Minerva has some) as LaTeX's."""
    inside = (last_boxed(gold) or gold) if "\\boxed" in gold else gold
    return inside.replace("np.arc", "\\arc")


def same(said: str, gold: str) -> bool:
    """By one of the three tests. Remembered by answer and gold: samples of a question agree often."""
    said, gold = unboxed(said), unboxed(gold)
    if max(len(said), len(gold)) > LONGEST_ANSWER:
        return same_text(said, gold)
    return _same(said, gold)


@lru_cache(maxsize=65_536)
def _same(said: str, gold: str) -> bool:
    if other_line(said, gold):
        return False
    if not has_letters(normal(gold)):
        said = without_letter(said)
    if is_interval(gold):
        said = as_interval(said)
    elif is_interval(said):
        gold = as_interval(gold)
    return same_text(said, gold) or same_expression(said, gold) or same_by_math_verify(said, gold)


def same_text(said: str, gold: str) -> bool:
    """By `latex.normal`; nothing is no answer."""
    return normal(said) == normal(gold) != ""


def same_expression(said: str, gold: str) -> bool:
    """PRM800K's test (arXiv 2305.20050, its repository's grader): after a plainer spelling the texts are the same, or
    equal expressions: number by number of a tuple, an integer only by itself, a fraction only as it stands (reduced),
    with at most two letters. Numbers of any size and powers beyond `arithmetic` are compared as text alone.
    """
    word, fold = is_word(said) or is_word(gold), not (both_cases(said) or both_cases(gold))
    said, gold = plain(said, fold), plain(gold, fold)
    if said == gold or word or max(len(said), len(gold)) > LONGEST_ANSWER:
        return said == gold != ""
    ours, theirs = parts(said), parts(gold)
    if len(ours) != len(theirs) or (len(theirs) > 1 and (said[0], said[-1]) != (gold[0], gold[-1])):
        return False
    return all(_same_part(a, b) for a, b in zip(ours, theirs, strict=True))


def _same_part(said: str, gold: str) -> bool:
    if said == gold:
        return said != ""
    if _FRACTION.fullmatch(said) and _FRACTION.fullmatch(gold):
        return said.replace("(", "").replace(")", "") == gold.replace("(", "").replace(")", "")
    if _INTEGER.fullmatch(gold):
        return bool(_INTEGER.fullmatch(said)) and Decimal(said) == Decimal(gold)
    if len(set(_LETTERS.findall(re.sub(r"sqrt|pi", "", f"{said}{gold}")))) > MOST_LETTERS:
        return False
    ours, theirs = read(said), read(gold)
    if ours is None or theirs is None:
        return False
    from sympy import simplify

    return bool(simplify(ours - theirs) == 0)


def both_cases(*texts: str) -> str:
    """Capitals that stand for something else than their small letters, M beside m, in one of the texts."""
    found = [set(filter(str.isalpha, _WHOLE_WORD.sub("", text))) for text in texts]
    return "".join(sorted({letter for letters in found for letter in letters if letter.lower() in letters - {letter}}))


def told_apart(said: str, gold: str) -> tuple[str, str]:
    """M beside m as another small letter, in both: math-verify makes all letters small."""
    capitals = both_cases(said, gold)
    free = (letter for letter in string.ascii_lowercase if letter not in (said + gold).lower())
    other = dict(zip(capitals, free, strict=False))

    def renamed(text: str) -> str:
        return _OR_LETTER.sub(lambda found: other.get(found.group(), found.group()), text)

    return renamed(said), renamed(gold)


def plain(text: str, fold: bool = True) -> str:
    """In a line, in small letters if `fold`: \\frac{a}{b} -> ((a)/(b)), 3\\sqrt2 -> 3sqrt(2), 2 million -> 2*10^6."""
    text = unnamed(words(without_words(bare(text))).strip())
    text = repeated(text.lower() if fold else text)
    text = large(roots(fractions(text)).replace("\\pi", " pi "))
    text = _WORDS.sub(",", without_unit(text)).replace("\\cdot", "*").replace("\\times", "*")
    text = _MIXED.sub(lambda found: "({}+{}/{})".format(*(part for part in found.groups() if part)), text)
    text = _alone(together(whole(_over(text).strip()).replace("{", "(").replace("}", ")")))
    number = re.fullmatch(r"([+-]?\d+)\.0*", text)
    return number.group(1) if number else written_out(text)


def _alone(text: str) -> str:
    """(2) -> 2; a tuple and (2)(3) stay."""
    while text[:1] == "(" and text[-1:] == ")" and not set(text[1:-1]) & set("(),[]"):
        text = text[1:-1]
    return text


def _over(text: str) -> str:
    """Fractions and roots as they are written in a line."""
    for name, made in (("\\frac", "(({0})/({1}))"), ("\\sqrt", "sqrt({0})")):
        while (start := text.find(name + "{")) >= 0:
            at, found = start + len(name), []
            for _ in range(made.count("{")):
                inside = braced(text, at) if text[at : at + 1] == "{" else None
                if inside is None:
                    return text
                found.append(inside)
                at += len(inside) + 2
            text = text[:start] + made.format(*found) + text[at:]
    return text


def parts(text: str) -> list[str]:
    """(a,b] -> a, b; anything else, and what has brackets inside, is one."""
    inside = text[1:-1]
    if "," in inside and text[0] in OPENING and text[-1] in CLOSING and not set(inside) & set(OPENING + CLOSING):
        return inside.split(",")
    return [text]


def same_by_math_verify(said: str, gold: str) -> bool:
    """math-verify, box against box: no fallback, units dropped by our rules (its own drop any of the letters m, t, d, h
    after a number: 2t would be 2). Not asked where what it does not read differs (`beside`), nor about long texts that
    repeat themselves.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    if contradict(said, gold):
        return False
    said, gold = told_apart(said, gold)
    if len(said) > LONG and len(zlib.compress(said.encode())) < REPETITIVE * len(said.encode()):
        return False
    latex = LatexExtractionConfig(boxed_match_priority=0, normalization_config=_normalization())
    how = {"fallback_mode": "no_fallback", "parsing_timeout": None}
    ours, theirs = (
        parse(f"\\boxed{{{valued(text)}}}", (latex, ExprExtractionConfig()), **how) for text in (said, gold)
    )
    return verify(theirs, ours, timeout_seconds=None) is True


def valued(text: str) -> str:
    """Without a unit, and otherwise as it is written."""
    given = bare(text)
    value = without_unit(without_words(given)).strip()
    return unicode_free(text) if value == " ".join(given.split()) else value


@cache
def _normalization() -> "NormalizationConfig":
    from math_verify import LatexExtractionConfig

    return replace(LatexExtractionConfig().normalization_config, units=False)
