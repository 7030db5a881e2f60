"""Expressions read without running anything: sympy's own reader evaluates Python, this one knows sums, products,
powers, roots and letters.

    read("2*x^2 + sqrt(3)/(1+pi)")  ->  a sympy expression, or None where the text is no such expression
"""

import re
from typing import Any

LONGEST_EXPRESSION, DEEPEST, LARGEST_POWER, MOST_BITS = 300, 40, 99, 4096
"""Characters of the text, sums within sums, an exponent, and bits of a power of numbers: more is not read."""

_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d*)?|\.\d+)|(sqrt|pi|[a-zA-Z])|([-+*/^()]))")


def read(text: str) -> Any | None:
    """The expression, or None: it is none, it is too long or nested too deep, or a power in it is too large."""
    from sympy import SympifyError

    if len(text) > LONGEST_EXPRESSION:
        return None
    reader = _Reader(text)
    try:
        found = reader.sum()
    except (_Unreadable, ZeroDivisionError, SympifyError):
        return None
    return found if reader.done else None


class _Unreadable(ValueError):
    pass


class _Reader:
    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        at, text = 0, text.rstrip()
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                self.tokens = ["?"]  # nothing begins with it
                break
            self.tokens.append(match.group().strip())
            at = match.end()
        self.at = self.depth = 0

    @property
    def done(self) -> bool:
        return self.at == len(self.tokens)

    @property
    def next(self) -> str:
        return "" if self.done else self.tokens[self.at]

    def take(self, *wanted: str) -> str:
        if self.next in wanted:
            self.at += 1
            return self.tokens[self.at - 1]
        return ""

    def sum(self) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            raise _Unreadable
        found = self.product()
        while sign := self.take("+", "-"):
            other = self.product()
            found = found + other if sign == "+" else found - other
        self.depth -= 1
        return found

    def product(self) -> Any:
        found = self.signed()
        while True:
            if sign := self.take("*", "/"):
                other = self.signed()
                if sign == "/" and other == 0:
                    raise _Unreadable
                found = found * other if sign == "*" else found / other
            elif self.next and (self.next[0].isalnum() or self.next == "("):
                found = found * self.power()  # 2x, 3(1 + y)
            else:
                return found

    def signed(self) -> Any:
        minus = False
        while sign := self.take("+", "-"):
            minus ^= sign == "-"
        found = self.power()
        return -found if minus else found

    def power(self) -> Any:
        base = self.atom()
        if not self.take("^"):
            return base
        exponent = self.signed()
        towers = self.next == "^" or (exponent.is_number and not abs(exponent) <= LARGEST_POWER)
        bits = max(abs(base.p), base.q).bit_length() if base.is_Rational and exponent.is_number else 0
        if towers or (bits and bits * abs(exponent) > MOST_BITS) or (base == 0 and not exponent.is_positive):
            raise _Unreadable
        return base**exponent

    def atom(self) -> Any:
        import sympy

        token = self.next
        self.at += 1
        if token == "(":
            found = self.sum()
            if not self.take(")"):
                raise _Unreadable
            return found
        if token == "sqrt":
            if self.next != "(":
                raise _Unreadable
            return sympy.sqrt(self.atom())
        if token == "pi":
            return sympy.pi
        if token[:1].isdigit() or token[:1] == ".":
            return sympy.Rational(token.rstrip(".")) if token != "." else _refuse()
        if len(token) == 1 and token.isalpha():
            return sympy.Symbol(token)
        return _refuse()


def _refuse() -> Any:
    raise _Unreadable
