"""Take values out of a row, or say in one sentence which column holds what it must not."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from luffy.data.problem import DataError

Row = Mapping[str, Any]


def typed(row: Row, column: str, kind: type, meaning: str, where: str) -> Any:
    value = row.get(column)
    if not isinstance(value, kind):
        raise wrong_type(column, meaning, value, where)
    return value


def text(row: Row, column: str, where: str) -> str:
    """A string; "" for null or an absent column."""
    value = row.get(column)
    return "" if value is None else typed(row, column, str, "a string", where)


def texts(row: Row, column: str, where: str) -> list[str]:
    """A list of strings; empty for null or an absent column."""
    value = row.get(column)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise wrong_type(column, "a list of strings", value, where)
    return value


def lists(row: Row, column: str, where: str) -> list[list[Any]]:
    """A list of lists; empty for null or an absent column."""
    value = row.get(column)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, list) for one in value):
        raise wrong_type(column, "a list of lists", value, where)
    return value


def turns(row: Row, column: str, where: str) -> tuple[Mapping[str, str], ...]:
    """Chat turns as {role, content}; whatever else a turn holds is left out. Raises DataError where there are none, or
    one is no turn."""
    found = typed(row, column, list, "a list of {content, role}", where)
    for turn in found:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise wrong_type(column, "a list of {content, role} with string values", turn, where)
    if not found:
        raise DataError(f"{where}: column {column!r} must not be empty")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in found)


def conversation(row: Row, column: str, where: str) -> tuple[Mapping[str, str], ...]:
    """Chat turns. Raises DataError where they do not end with one of the user's that says something."""
    found = turns(row, column, where)
    if found[-1]["role"] != "user" or not found[-1]["content"].strip():
        raise DataError(
            f"{where}: column {column!r} must end with a user's turn that is not empty, got {found[-1]!r:.60}"
        )
    return found


def asked(row: Row, column: str, where: str) -> tuple[Mapping[str, str], ...]:
    """The one user turn of a question. Raises DataError where that is empty."""
    question = typed(row, column, str, "a string", where)
    if not question.strip():
        raise DataError(f"{where}: column {column!r} must not be empty")
    return ({"role": "user", "content": question},)


def encodable(text: str, where: str) -> None:
    """Raises DataError where half of a character is in it, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise DataError(f"{where}: a text holds {half!r}, which is half of a character") from None


def answers(row: Row, column: str, where: str) -> str | tuple[str, ...]:
    """The accepted answer or answers; "" for null, an absent column and an empty text."""
    value = row.get(column)
    if isinstance(value, list) and value and all(isinstance(one, str) and one.strip() for one in value):
        return tuple(value)
    if value is None or isinstance(value, str):
        return (value or "").strip()
    raise wrong_type(column, "a string, or a list of strings that are not empty", value, where)


def distinct(found: Iterable[str]) -> tuple[str, ...]:
    """The first of equal texts, in order; an empty text is none."""
    return tuple(dict.fromkeys(one for one in found if one))


def first_of_equals(found: Sequence[str]) -> list[int]:
    """Where `distinct` finds its texts."""
    first = {one: at for at, one in reversed(list(enumerate(found))) if one}
    return sorted(first.values())


def one_for_each(column: str, given: Sequence[Any], traces: Sequence[str], where: str) -> None:
    """Raises DataError where a column that is there has not an entry for each trace."""
    if given and len(given) != len(traces):
        raise DataError(
            f"{where}: column {column!r} must have an entry for each trace, {len(traces)} in all, got {len(given)}"
        )


def scalars(row: Row, *names: str) -> dict[str, Any]:
    """Of these columns, those that hold a text or a number."""
    return {name: row[name] for name in names if isinstance(row.get(name), str | int | float)}


def wrong_type(column: str, meaning: str, value: Any, where: str) -> DataError:
    """What is raised where a column holds something else than its `meaning`."""
    return DataError(f"{where}: column {column!r} must be {meaning}, got {type(value).__name__} {value!r:.60}")
