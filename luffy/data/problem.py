"""What a problem is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class DataError(ValueError):
    """The data cannot be used; the message is one sentence that says what is wrong and where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question with a verifiable answer and any number of worked solutions.

    id: stable and unique within its source. messages: role/content turns, the last one the user's.
    answer: the accepted answer, or a tuple of accepted ones; "" where the row has none, and `tokenize` leaves it out.
    traces: texts, as the teacher wrote them. extra: everything else the row said, for reports.
    """

    id: str
    data_source: str
    messages: tuple[Mapping[str, str], ...]
    answer: str | tuple[str, ...]
    traces: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
