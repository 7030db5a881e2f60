"""Inequalities in one letter as the intervals that they describe: LUFFY's first two tests read neither as the other.

as_interval("-1 < x \\\\le 2")  ->  "(-1,2]"        as_interval("x \\\\ge 3")  ->  "[3,\\\\infty)"
"""

import re

from luffy.rewards.latex import bare, whole

_GREEK = "alpha|beta|gamma|delta|epsilon|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|psi|omega"
_NAME = rf"(?:[a-zA-Z]|\\(?:{_GREEK}))(?:_(?:\w|\{{\w+\}}))?(?:\([a-zA-Z]\))?"
_SIGN = r"(<|>|\\le|\\ge)"
_BOUND = r"((?:(?!\\[lg]e)[^<>,=]|,(?=\d{3}))+)"
_BETWEEN = re.compile(rf"{_BOUND}{_SIGN}{_NAME}{_SIGN}{_BOUND}")
_RIGHT = re.compile(rf"{_NAME}{_SIGN}{_BOUND}")
_LEFT = re.compile(rf"{_BOUND}{_SIGN}{_NAME}")
_BUILT = re.compile(rf"\\\{{{_NAME}(?:\\in\\mathbb\{{R\}})?(?::|\||\\mid|\\vert)(.*)\\\}}")
_MEMBER = re.compile(rf"{_NAME}\\in(?=[(\[])")
_OR = re.compile(r"\\(?:text|mbox|mathrm)\s*\{\s*or\s*\}|\\lor(?![a-zA-Z])|\\cup|\bor\b")
_TURNED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


def is_interval(text: str) -> bool:
    """Whether it is written with brackets, as (1,2], x \\in [0,1] and unions are."""
    tight = _tight(text)
    return _MEMBER.sub("", tight, count=1)[:1] in ("(", "[")


def as_interval(text: str) -> str:
    """The interval that an inequality (or several with "or") describes; any other text as it is."""
    tight = _BUILT.fullmatch(_tight(text))
    found = [_one(_tight(part)) for part in _OR.split(tight.group(1) if tight else bare(text))]
    return "\\cup".join(found) if all(found) else text


def _tight(text: str) -> str:
    return "".join(bare(text).split())


def _one(text: str) -> str:
    """ "" where it is no inequality that says between what one letter lies."""
    if found := _BETWEEN.fullmatch(text):
        low, opens, closes, high = found.groups()
        if opens[-1] in ">" or opens == "\\ge":
            low, opens, closes, high = high, _TURNED[closes], _TURNED[opens], low
        return _written(low, opens, closes, high)
    if found := _RIGHT.fullmatch(text):
        sign, bound = found.groups()
    elif found := _LEFT.fullmatch(text):
        bound, sign = found.groups()
        sign = _TURNED[sign]
    else:
        return ""
    return (
        _written("-\\infty", "<", sign, bound)
        if sign in ("<", "\\le")
        else _written(bound, _TURNED[sign], "<", "\\infty")
    )


def _written(low: str, opens: str, closes: str, high: str) -> str:
    """Both signs point the same way, and bounds are no lists."""
    low, high = whole(low), whole(high)
    if opens not in ("<", "\\le") or closes not in ("<", "\\le") or "," in low + high:
        return ""
    return f"{'(' if opens == '<' else '['}{low},{high}{')' if closes == '<' else ']'}"
