"""Numbers whose value their text does not show: repeating decimals, powers of ten, numbers with words.

The tests of the published graders read none of them but 2 million and 3e8.
"""

import re
from decimal import Decimal
from fractions import Fraction

LONGEST_DECIMAL = 128
"""Digits, and signs, of a repeating decimal."""

_WORDS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_LARGE = re.compile(rf"(?<=\d)\s*({'|'.join(_WORDS)})s?\b")
_DOZEN = re.compile(r"(?<![\d.])(\d{1,12}(?:\.\d{1,6})?)\s*dozens?\b")
_SCIENTIFIC = re.compile(r"([+-]?\d*\.?\d+|[+-]?\d+\.)(?:e|\*10\^\(?)([+-]?\d{1,3})\)?")
_BAR = re.compile(r"\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d))")
_DOTS = re.compile(r"\\dot\s*(?:\{(\d)\}|(\d))")
_GOES_ON = re.compile(r"(\d)\1{2,}(?:\\[lc]?dots|\.\.\.|\u2026)")
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\((\d+)\)")


def large(text: str) -> str:
    """2 million -> 2*10^6, 5 dozen -> 60."""
    text = _LARGE.sub(lambda found: f"*10^{_WORDS[found.group(1)]}", text)
    return _DOZEN.sub(lambda found: f"{(12 * Decimal(found.group(1))).normalize():f}", text)


def repeated(text: str) -> str:
    """0.1\\overline{6}, 0.1\\dot6, 0.1(6) and 0.1666\\ldots -> 1/6; any other text as it is."""
    if "." not in text or len(text) > LONGEST_DECIMAL:
        return text
    tight = "".join(text.split())
    tight = _BAR.sub(lambda found: f"({found.group(1) or found.group(2)})", tight)
    tight = _GOES_ON.sub(r"(\1)", _dotted(tight))
    found = _REPEATING.fullmatch(tight)
    if found is None:
        return text
    sign, whole_part, once, again = found.groups()
    nines = 10 ** len(once + again) - 10 ** len(once)
    return f"{sign}{Fraction(int(whole_part + once + again) - int(whole_part + once or '0'), nines)}"


def _dotted(text: str) -> str:
    """0.\\dot14\\dot2 -> 0.(142): what stands between two dots repeats with them."""
    dots = list(_DOTS.finditer(text))
    if not 1 <= len(dots) <= 2:
        return text
    first, last = dots[0], dots[-1]
    digits = [found.group(1) or found.group(2) for found in dots]
    again = digits[0] if first is last else digits[0] + text[first.end() : last.start()] + digits[1]
    return f"{text[: first.start()]}({again}){text[last.end() :]}"


def written_out(text: str) -> str:
    """3.61e2 and 3.61*10^2 -> 361, 1e-5 -> 0.00001."""
    found = _SCIENTIFIC.fullmatch(text)
    return f"{Decimal(found.group(1)).scaleb(int(found.group(2))).normalize():f}" if found else text
