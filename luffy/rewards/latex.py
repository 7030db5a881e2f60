"""What a mathematical answer says, less how it is written: boxes, and the string that two spellings have in common.

    normal("\\dfrac12\\text{ cm}") == normal("x = 1/2") == "\\frac{1}{2}"

The rules are those of the MATH benchmark's equality (arXiv 2103.03874), widened as Minerva's and Qwen2.5-Math's
evaluations do (arXiv 2206.14858 appendix D.1; arXiv 2409.12122): units, matrices, names of relations, degrees, percent
signs, thousands separators. A bare letter is no unit here: in a formula it is a variable (but see `without_letter`).
"""

import re
from functools import cache

from luffy.rewards.units import DAYTIME, LETTER_UNITS, SAYS, SHORT_UNITS, UNITS

_MARKS = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u00d7": "\\times ",
        "\u00b7": "\\cdot ",
        "\u00f7": "/",
        "\u03c0": "\\pi ",
        "\u221e": "\\infty ",
    }
    | {
        "\u00b0": "^\\circ ",
        "\u2264": "\\le ",
        "\u2265": "\\ge ",
        "\u2260": "\\ne ",
        "\u222a": "\\cup ",
        "\u2229": "\\cap ",
        "\u00bd": "\\frac{1}{2}",
        "\u00bc": "\\frac{1}{4}",
        "\u00be": "\\frac{3}{4}",
        "\u2153": "\\frac{1}{3}",
        "\u2154": "\\frac{2}{3}",
    }
    | {"\u00a0": " ", "\u2009": " ", "\u202f": " "}
)
_RAISED = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b]+")
_RAISED_DIGITS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b", "0123456789+-"
)
_ROOT_SIGN = re.compile("\u221a\\s*(?:\\(([^()]*)\\)|(\\d+|[a-zA-Z])?)")
_BRACE = re.compile(r"[{}]")
_BOX = re.compile(r"\\boxed\s*\{")
_NOTHING = re.compile(r",\s*\\!\s*|\\!")
_SPACES = re.compile(r"\\[,;: ]|~|\\q?quad\b|\\(?:left|right|displaystyle|textstyle|limits|bigl?|bigr?)(?![a-zA-Z])")
_DOLLARS = re.compile(r"\\?\$|\\[()\[\]](?!\d)")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_MATRIX = re.compile(r"\\(begin|end)\{(?:b|small|p)?matrix\}")
_ARRAY = re.compile(r"\\begin\{array\}(?:\{[^{}]*\})?|\\end\{array\}")
_MONEY = re.compile(r"\\\$\s*([\d.,]+)\s*(?:\\(?:text|mathrm)\s*\{\s*[kK]\s*\}|[kK](?![a-zA-Z]))")
_FUNCTIONS = "arc(?:sin|cos|tan)|sin|cos|tan|ln|log|exp|gcd|max|min"
_NAMES = re.compile(rf"\\(?:text|mathrm|operatorname)\s*\{{\s*({_FUNCTIONS})\s*\}}")
_RELATIONS = ((re.compile(r"\\neq?(?![a-zA-Z])|\\not\s*="), r"\\ne "),
              (re.compile(r"\\leq?(?:slant)?(?![a-zA-Z])|<="), r"\\le "),
              (re.compile(r"\\geq?(?:slant)?(?![a-zA-Z])|>="), r"\\ge "),
              (re.compile(r"\\lt(?![a-zA-Z])"), "<"), (re.compile(r"\\gt(?![a-zA-Z])"), ">"))  # fmt: skip
_SETS = ((re.compile(r"\\([lr])brace(?![a-zA-Z])"), lambda found: "\\{" if found.group(1) == "l" else "\\}"),
         (re.compile(r"\\bigcup(?![a-zA-Z])"), r"\\cup "), (re.compile(r"\\[dt]binom(?![a-zA-Z])"), r"\\binom"),
         (re.compile(r"\\sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
         (re.compile(r"(\\sqrt\s*\[\w+\])\s*(\w)"), r"\1{\2}"),
         (_NAMES, r"\\\1 "),
         (re.compile(r"\\varnothing(?![a-zA-Z])"), r"\\emptyset "),
         (re.compile(r"\\mathbb\s*([A-Z])"), r"\\mathbb{\1}"))  # fmt: skip
_DEGREES = re.compile(
    r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z]))(?:\s*(?:[CF]|\\(?:text|mathrm)\s*\{\s*[CF]\s*\})\s*$)?"
)
_PERCENT = re.compile(r"\\?%")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
_WORD = r"\\(?:text|mbox|mathrm)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
_AFTER = re.compile(rf"(?<=[\d}})a-zA-Z])\s*(?:(?:\\cdot\s*|/\s*)?{_WORD}\s*(?:\^\s*\{{?-?\d\}}?\s*)?)+$")
_INSIDE = re.compile(_WORD)
_ALSO = re.compile(r"(?:(?<=[a-z]),| and|, and) ?\}(?= ?\d)")
_POWER = r"(?:\^\{?-?\d\}?)?"
_LETTER_UNIT = re.compile(
    rf"(?<=[\d}})]) [cdkm]?[mgsKJWNVACFHTLh]{_POWER}(?: ?/ ?[cdkm]?[mgsKJhL]{_POWER}| [mgsKJhL]\^\{{?-\d\}}?)*\.?$"
)
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_EXPONENT = re.compile(r"(?<=\d)[eE](?=[+-]?\d)")
_ORDINAL = re.compile(r"(?:even|elf|een|ie)ths?$")
_HOUR = re.compile(r"(?<![\d.])\d{1,2}(?::\d\d)?\s*$")
_THOUSANDS = re.compile(r"([+-]?\d{1,3})((?:[, ]\d{3})+)(\.\d+)?")
_POINT = re.compile(r"(?<![\d.])\.(?=\d)")
_ZEROS = re.compile(r"([+-]?\d+)\.0*")
_NAMED = re.compile(r"[a-zA-Z]{1,2}\s*(?:=|\\in(?![a-zA-Z]))\s*(?!.*=)")
_ROOT = re.compile(r"\\sqrt\s*([a-zA-Z0-9])")
_MIXED = re.compile(r"([+-]?\d+) +(\d+)/(\d+)")
_APART = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_SLASH = re.compile(r"([+-]?)(\d+)/(\d+)")
_SINGLE = re.compile(r"([_^])\{([a-zA-Z0-9+*-])\}")
_HALF = re.compile(r"(?<![\d.])0\.5(?!\d)")


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}` with its braces matched; None when there is none or it never closes."""
    starts = [found.end() - 1 for found in _BOX.finditer(text)]
    return braced(text, starts[-1]) if starts else None


def braced(text: str, at: int) -> str | None:
    """What stands between the brace at `at` and its partner; None where it never closes."""
    depth = 0
    for brace in _BRACE.finditer(text, at):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[at + 1 : brace.start()]
    return None


def normal(text: str) -> str:
    """The string that stands for the answer; see the module."""
    text = without_words(_ALSO.sub("}", bare(text).rstrip(".")))
    text = whole(without_unit(words(text)).strip())
    text = _POINT.sub("0.", text)
    text = unnamed(text)
    if found := _MIXED.fullmatch(text):
        text = "{}\\frac{{{}}}{{{}}}".format(*found.groups())
    text = together(roots(fractions(text)))
    if found := _ZEROS.fullmatch(text):
        text = found.group(1)
    if found := _SLASH.fullmatch(text):
        text = f"{found.group(1)}\\frac{{{found.group(2)}}}{{{found.group(3)}}}"
    return _HALF.sub(r"\\frac{1}{2}", _SINGLE.sub(r"\1\2", text))


def unicode_free(text: str) -> str:
    """LaTeX for what has signs of its own: \u221a13 -> \\sqrt{13}, 10\u2075 -> 10^{5}."""
    text = _ROOT_SIGN.sub(lambda found: f"\\sqrt{{{found.group(1) or found.group(2) or ''}}}", text.translate(_MARKS))
    return _RAISED.sub(lambda found: f"^{{{found.group().translate(_RAISED_DIGITS)}}}", text)


def bare(text: str) -> str:
    """Without signs that only format: spaces, dollars, sizes of brackets, degrees, percent, a full stop at the end (but
    no three, which say that digits go on)."""
    text = _MONEY.sub(r"\1 thousand", unicode_free(text)).replace("{,}", ",").strip()
    if "\\begin" not in text:
        text = text.replace("\\\\", "\\")
    text = _NOTHING.sub(lambda found: found.group()[: found.group().startswith(",")], text)
    text = _DOLLARS.sub("", _SPACES.sub(" ", text))
    text = _MATRIX.sub(r"\\\1{pmatrix}", _FRACTION.sub(r"\\frac", text))
    text = _ARRAY.sub(lambda found: "\\begin{pmatrix}" if "begin" in found.group() else "\\end{pmatrix}", text)
    for pattern, name in _RELATIONS + _SETS:
        text = pattern.sub(name, text)
    text = _PERCENT.sub("", _DEGREES.sub("", text)).strip()
    return text if text.endswith("...") else text.rstrip(".,;").strip()


def unnamed(text: str) -> str:
    """x = 3 and x \\in (0,1) -> 3 and (0,1); a chain of equations stays."""
    return _NAMED.sub("", text, count=1) if _NAMED.match(text) else text


def whole(text: str) -> str:
    """10,080 and 10 080 -> 10080, where the text is nothing else."""
    return re.sub("[, ]", "", text) if _THOUSANDS.fullmatch(text) else text


def together(text: str) -> str:
    """Without spaces, but for those between digits: "20 4" is no 204."""
    return _APART.sub("", text)


def without_words(text: str) -> str:
    """5\\text{ cm}^2 -> 5; what stands behind the answer stays if it says more than a unit."""
    found = _AFTER.search(text)
    if found is None:
        return text
    said = re.split(r"[\s/.~-]+|\^\{?-?\d\}?|\\cdot", " ".join(_INSIDE.findall(found.group())).strip())
    value = text[: found.start()]
    return value if all(_is_unit(word, value) for word in said if word) else text


def _is_unit(word: str, value: str) -> bool:
    """Of a word behind a value: what counts it (apples), or a sign of one letter or two that is known."""
    low = word.lower()
    if len(word) <= 2:
        known = word in LETTER_UNITS or low in SHORT_UNITS or low in UNITS
        return known and not (low in DAYTIME and _HOUR.search(value))
    return word.isalpha() and low not in SAYS and not _ORDINAL.search(low)


def words_of(text: str) -> list[str]:
    """The words in an answer, and behind it, that are no unit."""
    return [found.group(1) for found in _INSIDE.finditer(without_words(bare(text)))]


def words(text: str) -> str:
    """\\text{cm} -> cm."""
    return _TEXT.sub(r" \1", text)


@cache
def _units() -> re.Pattern[str]:
    words = "|".join(sorted((re.escape(unit) for unit in UNITS), key=len, reverse=True))
    unit = rf"(?:{words})(?:e?s)?(?:\s*\^\s*\{{?-?\d\}}?)?"
    behind = r"(?:(?<=[\d)}])|(?<=\\pi))\s*(?:\b|(?<=\d))"
    return re.compile(rf"{behind}{unit}(?:(?: ?/ ?| per | ){unit})*\.? ?$", re.IGNORECASE)


def without_unit(text: str) -> str:
    """5 cm^2 -> 5; nothing where no number stands before the unit."""
    return _units().sub("", " ".join(text.split()))  # one space each: there is one way to read it, and no waiting


def without_letter(text: str) -> str:
    """5 m -> 5 and 9.8 m/s^2 -> 9.8: for answers to what is a number, where no letter is a variable. No money: 5 K."""
    return text if "\\$" in text else _LETTER_UNIT.sub("", " ".join(text.split()))


def has_letters(text: str) -> bool:
    """Besides those of commands."""
    return any(letter.isalpha() for letter in _EXPONENT.sub("", _COMMAND.sub("", text)))


def roots(text: str) -> str:
    """\\sqrt2 -> \\sqrt{2}."""
    return _ROOT.sub(r"\\sqrt{\1}", text)


def fractions(text: str) -> str:
    """\\frac12, \\frac1{2}, \\frac{1}2 -> \\frac{1}{2}."""
    made, at = [], 0
    while (start := text.find("\\frac", at)) >= 0:
        made.append(text[at:start] + "\\frac")
        at = start + len("\\frac")
        for _ in range(2):
            while at < len(text) and text[at].isspace():
                at += 1
            inside = braced(text, at) if text[at : at + 1] == "{" else None
            if inside is not None:
                made.append(f"{{{fractions(inside)}}}")
                at += len(inside) + 2
            elif text[at : at + 1].isalnum():
                made.append(f"{{{text[at]}}}")
                at += 1
            else:
                break
    return "".join([*made, text[at:]])
