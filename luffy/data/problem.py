"""What a problem is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Logps = tuple[float, ...]


class DataError(ValueError):
    """The data cannot be used; the message is one sentence that says what is wrong and where."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with a verifiable answer and any number of worked solutions.

    id: stable and unique within its source. messages: role/content turns, the last one the user's.
    answer: the accepted answer, or a tuple of accepted ones; "" where the row has none, and `tokenize` leaves it out.
    traces: texts, as the teacher wrote them. teachers: who wrote each trace; () where nothing is said.
    trace_logps: log-probs of each trace's tokens, EOS included, under its teacher, nats; () of a trace, or as a whole,
    where they are not known. extra: everything else the row said, for reports.
    """

    id: str
    data_source: str
    messages: tuple[Mapping[str, str], ...]
    answer: str | tuple[str, ...]
    traces: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()
    trace_logps: tuple[Logps, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
