"""Inequalities in one letter as the intervals that they describe: LUFFY's first two tests read neither as the other.

as_interval("-1 < x \\\\le 2")  ->  "(-1,2]"        as_interval("x \\\\ge 3")  ->  "[3,\\\\infty)"
"""

import re

from luffy.rewards.latex import bare, whole

_GREEK = "alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|(?:var)?phi|chi|psi"
_NAME = rf"((?:[a-zA-Z]|\\(?:{_GREEK}|omega))(?:_(?:\w|\{{\w+\}}))?(?:\([a-zA-Z]\))?)"
_SIGN = r"(<|>|\\le|\\ge)"
_BOUND = r"((?:(?!\\[lg]e)[^<>,=]|,(?=\d{3}))+)"
_BETWEEN = re.compile(rf"{_BOUND}{_SIGN}{_NAME}{_SIGN}{_BOUND}")
_RIGHT = re.compile(rf"{_NAME}{_SIGN}{_BOUND}")
_LEFT = re.compile(rf"{_BOUND}{_SIGN}{_NAME}")
_EXCEPT = re.compile(rf"{_NAME}\\ne{_BOUND}")
_WITHOUT = re.compile(rf"\\mathbb\{{R\}}\\(?:setminus|backslash)\\\{{{_BOUND}\\\}}")
_BUILT = re.compile(rf"\\\{{{_NAME}(?:\\in\\mathbb\{{R\}})?(?::|\||\\mid|\\vert)(.*)\\\}}")
_MEMBER = re.compile(rf"{_NAME}\\in(?=[(\[])")
_OR = re.compile(r"\\(?:text|mbox|mathrm)\s*\{\s*or\s*\}|\\lor(?![a-zA-Z])|\\cup|\bor\b")
_TURNED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


def is_interval(text: str) -> bool:
    """Whether it is written with brackets, as (1,2], x \\in [0,1] and unions are; points and products too."""
    tight = _tight(text)
    return _MEMBER.sub("", tight, count=1)[:1] in ("(", "[")


def as_interval(text: str) -> str:
    """The interval that an inequality (or several with "or") describes; any other text as it is."""
    tight = _BUILT.fullmatch(_tight(text))
    found = [_one(_tight(part)) for part in _OR.split(tight.group(2) if tight else bare(text))]
    names = {name for name, _ in found} - {""}
    return "\\cup".join(written for _, written in found) if len(names) < 2 and all(w for _, w in found) else text


def _tight(text: str) -> str:
    return "".join(bare(text).split())


def _one(text: str) -> tuple[str, str]:
    """(the letter, between what it lies); ("", "") where that is not what the text says."""
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        return "", text  # of several with "or"
    if text == "\\mathbb{R}":
        return "", "(-\\infty,\\infty)"
    if found := _WITHOUT.fullmatch(text):
        return "", _around(found.group(1))
    if found := _EXCEPT.fullmatch(text):
        return found.group(1), _around(found.group(2))
    if found := _BETWEEN.fullmatch(text):
        low, opens, name, closes, high = found.groups()
        if opens in (">", "\\ge"):
            low, opens, closes, high = high, _TURNED[closes], _TURNED[opens], low
        return name, _written(low, opens, closes, high)
    right, left = _RIGHT.fullmatch(text), _LEFT.fullmatch(text)
    if left and (right is None or right.group(1) not in "xyzt"):  # a < x says where x lies
        bound, sign, name = left.groups()
        sign = _TURNED[sign]
    elif right:
        name, sign, bound = right.groups()
    else:
        return "", ""
    if sign in ("<", "\\le"):
        return name, _written("-\\infty", "<", sign, bound)
    return name, _written(bound, _TURNED[sign], "<", "\\infty")


def _around(point: str) -> str:
    return f"(-\\infty,{point})\\cup({point},\\infty)" if "," not in point else ""


def _written(low: str, opens: str, closes: str, high: str) -> str:
    """Both signs point the same way, and bounds are no lists."""
    low, high = whole(low), whole(high)
    if opens not in ("<", "\\le") or closes not in ("<", "\\le") or "," in low + high:
        return ""
    return f"{'(' if opens == '<' else '['}{low},{high}{')' if closes == '<' else ']'}"
