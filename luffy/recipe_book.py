"""What recipes say when they are spelled out, and what tells two apart."""

from collections.abc import Iterator, Sequence
from typing import Any

WIDEST = 48
"""Characters of a value in a table."""


def spelled_out(source: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Every key of a recipe, None where it has no value; of one in two stages the first under `first`.

    Raises:
        UserError: as `load_stages`.
    """
    from luffy.config_file import load_stages

    *first, last = (stage.model_dump(mode="json") for stage in load_stages(source, list(overrides)))
    for stage in first:
        del stage["name"]  # it is the other's
        last["first"] = stage
    return last


def differing(one: str, other: str) -> Iterator[tuple[str, str, str]]:
    """(key, its value in one, in the other); a key that only one has is "-" in the other."""
    for key, *values in differences(spelled_out(one), spelled_out(other)):
        ours, theirs = ("-" if value is None else _shown(value) for value in values)
        yield key, ours, theirs


def differences(one: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, its value in one, in the other) of two that are spelled out; None where only one has the key."""
    ours, theirs = dict(_flat(one)), dict(_flat(other))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            yield key, ours.get(key), theirs.get(key)


def _flat(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, value


def _shown(value: Any) -> str:
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."
