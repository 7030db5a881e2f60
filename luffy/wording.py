"""Words of sentences that people read."""

import difflib
from collections.abc import Iterable

ALIKE = 0.6
"""Share of letters that two words have in common, in order: of three two may be swapped, and two of four are chance."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """That of those known which `word` may have been meant for; None: none is much like it."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=ALIKE)), None)


def counted(count: float, what: str, verb: tuple[str, str] = ("", "")) -> str:
    """1 problem has, 2,000 problems have. what: one of them, whose plural takes an s; verb: of one, and of others."""
    one = count == 1
    return f"{count:,} {what}{'' if one else 's'} {verb[not one]}".rstrip()
