"""What an answer says beside its value and a reader of expressions leaves out: bases, primes, relations, arrows, words,
dots, kinds of brackets. math-verify reads 52_8 as 52, f' as f, 3 \\to 4 as 4, 12:30 as 0.4 and BAC as ABC.
"""

import re

from luffy.rewards.latex import bare, normal, unnamed, words_of

_BASE = re.compile(r"\d_(?:\{\(?(\w+)\)?\}|(\w))$")
_PRIME = re.compile(r"'|\\prime(?![a-zA-Z])")
_MARKS_OF_FEET = re.compile(r"(?<=\d)['\u2032\u2033]+")
_ORDER = re.compile(r"\\(?:le|ge)(?![a-zA-Z])|[<>]")
_ONE_WAY = re.compile(r"\\(?:ne|approx|sim|not)(?![a-zA-Z])")
_BOTH_WAYS = re.compile(
    r"\\(?:equiv|to|implies|iff|[lL]ong(?:left)?rightarrow|[rR]ightarrow|[lc]?dots|text\s*\{\s*if)(?![a-zA-Z])"
    r"|(?<!\d)\d{1,2}:\d\d(?!\d)"
)
_SEPARATE = re.compile(r"[,;]|\b(?:and|or)\b")
_WORD = re.compile(r"[^\W\d_]+")
_PARTS = re.compile(r"\d\s*\\(?:text|mbox|mathrm)\s*\{[^{}]*\}[^a-zA-Z]*\d")
_LETTERS_ALONE = re.compile(r"[A-Z]{2,}|\\(?:text|mbox|mathrm)\s*\{[^{}]*[a-zA-Z]{2,}[^{}]*\}")
_LINE = re.compile(r"([xyz])\s*=[^=]*")
_JOINING = {"and", "or", "where", "with", "for", "any", "every", "all", "is", "a", "an", "integer", "integers"}


def contradict(said: str, gold: str) -> bool:
    """Whether two answers differ in something that is no part of the value."""
    ours, theirs = (text.rpartition("=")[2] for text in (said, gold))
    return (
        base_of(said) != base_of(gold)
        or primes(ours) != primes(theirs)
        or _marks(_BOTH_WAYS, said) != _marks(_BOTH_WAYS, gold)
        or bool(claims(said) - claims(gold))
        or bool(_PARTS.search(theirs) and _words(ours) != _words(theirs))  # 3 hours and 20 minutes are not 3
        or _brackets(said, gold)
        or is_word(said)
        or is_word(gold)
    )


def is_word(text: str) -> bool:
    """ABC or \\text{on}: no product of letters, it is that word or none."""
    return bool(_LETTERS_ALONE.fullmatch(bare(text)))


def other_line(said: str, gold: str) -> bool:
    """x = 2 is another line than y = 2."""
    ours, theirs = (_LINE.fullmatch(bare(text)) for text in (said, gold))
    return bool(ours and theirs and ours.group(1) != theirs.group(1))


def base_of(text: str) -> str:
    """8 of 52_8; "" of a number in none, or in base ten."""
    found = _BASE.search(normal(text))
    base = (found.group(1) or found.group(2)) if found else ""
    return "" if base == "10" else base


def primes(value: str) -> int:
    """f'' has two; 5' and 45'' are feet, minutes or seconds."""
    return len(_PRIME.findall(_MARKS_OF_FEET.sub("", value)))


def claims(text: str) -> set[str]:
    """What an answer may say only if the gold does: relations, a chain of equations, words in the value or behind."""
    order = {"order"} if _ORDER.search(bare(text)) else set()
    chain = {"chain"} if any(part.count("=") > 1 for part in _SEPARATE.split(text)) else set()
    return order | chain | _marks(_ONE_WAY, text) | _words(text.rpartition("=")[2])


def _marks(pattern: re.Pattern[str], text: str) -> set[str]:
    return set(pattern.findall(bare(text)))


def _words(value: str) -> set[str]:
    return set(_WORD.findall(" ".join(words_of(value)).casefold())) - _JOINING


def _brackets(said: str, gold: str) -> bool:
    """A pair is no set."""
    kinds = {enclosed(said), enclosed(gold)} - {""}
    return len(kinds) > 1 and "{" in kinds


def enclosed(text: str) -> str:
    """The bracket around a list, of (1,2) or \\{1,2\\}; "" of what is no list, or has none: (1,2),(3,4)."""
    text = unnamed(bare(text)).replace("\\{", "{").replace("\\}", "}")
    if "," not in text or text[:1] not in ("(", "[", "{"):
        return ""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0:
            return text[0] if at == len(text) - 1 else ""
    return ""
