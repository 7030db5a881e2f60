"""What a response is graded against: the accepted answer of a problem, or several."""

from collections.abc import Sequence

Answer = str | Sequence[str]


def golds_of(answer: Answer) -> tuple[str, ...]:
    """Every accepted answer."""
    return (answer,) if isinstance(answer, str) else tuple(answer)


def hashable(answer: Answer) -> Answer:
    """The same answer, to look things up by: several come out of a file as a list."""
    return answer if isinstance(answer, str) else tuple(answer)
