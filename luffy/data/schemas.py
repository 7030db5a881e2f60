"""The schemas that rows of problems come in, told apart by their columns. docs/data.md shows a row of each."""

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from luffy.data.columns import Row
from luffy.data.problem import DataError, Problem
from luffy.data.readers.chat import read_chat
from luffy.data.readers.gsm8k import read_gsm8k
from luffy.data.readers.luffy import read_luffy
from luffy.data.readers.numina import read_numina
from luffy.data.readers.openr1 import read_openr1
from luffy.data.readers.plain import read_plain
from luffy.wording import nearest


class Reader(Protocol):
    """Makes a problem of a row of one schema; raises DataError that names `where` if it cannot."""

    def __call__(self, row: Row, *, name: str, number: int, where: str) -> Problem:
        """name: of the source, without a suffix. number: of the row in its file, from 0. where: a place to name."""


@dataclass(frozen=True, slots=True)
class Schema:
    """required: columns that tell it apart. optional: columns that are read where there are any."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Reader

    def __str__(self) -> str:
        return f"{' and '.join(self.required)} (optional: {', '.join(self.optional) or 'none'})"


# The first that fits is taken: OpenR1's rows also have a solution and messages, NuminaMath's have messages.
SCHEMAS = (
    Schema(
        "luffy",
        ("prompt", "reward_model"),
        (
            *("target", "target_lst", "target_teachers", "target_logps", "target_ds_qwen_7b_probs"),
            *("data_source", "ability", "extra_info"),
        ),
        read_luffy,
    ),
    Schema(
        "openr1",
        ("problem", "generations"),
        ("answer", "correctness_math_verify", "is_reasoning_complete", "uuid", "source"),
        read_openr1,
    ),
    Schema("numina", ("problem", "solution"), ("answer", "source"), read_numina),
    Schema("chat", ("messages",), ("answer", "data_source"), read_chat),
    Schema("plain", ("prompt", "answer"), ("traces", "teachers", "data_source"), read_plain),
    Schema("gsm8k", ("question", "answer"), (), read_gsm8k),
)

TRACES = ("target", "target_lst", "target_teachers", "target_logps", "traces", "teachers", "generations")
"""Columns of traces and of what is known of them; each of one schema."""


def find_schema(columns: Iterable[str], where: str) -> Schema:
    """The schema of these columns. Raises DataError that names a missing column and the nearest one present."""
    present = list(columns)
    for schema in SCHEMAS:
        if set(schema.required) <= set(present):
            _refuse_misspelt(schema, present, where)
            _refuse_unread(schema, present, where)
            return schema
    schema = max(SCHEMAS, key=lambda one: _likeness(one, present))
    column = next(column for column in schema.required if column not in present)
    if near := nearest(column, present):
        said = f"the nearest column present is {near!r}"
    else:
        said = f"the columns present are {', '.join(map(repr, present))}" if present else "there are no columns"
    raise DataError(
        f"{where}: column {column!r} is missing, {said}; expected {schema}, or those of another schema in docs/data.md"
    )


def _refuse_misspelt(schema: Schema, present: Collection[str], where: str) -> None:
    """A misspelt optional column would silently turn guided training into on-policy training."""
    unknown = set(present) - {*schema.required, *schema.optional}
    for column in (column for column in schema.optional if column not in present):
        near = difflib.get_close_matches(column, unknown, n=1, cutoff=0.8)
        if near:
            raise DataError(f"{where}: column {near[0]!r} is unknown, is it {column!r}? expected {schema}")


def _refuse_unread(schema: Schema, present: Collection[str], where: str) -> None:
    """Traces that are there, and in a column that this schema does not have, would be lost just as silently."""
    for column in present:
        if column in TRACES and column not in (*schema.required, *schema.optional):
            [other] = [one for one in SCHEMAS if column in (*one.required, *one.optional)]
            raise DataError(
                f"{where}: column {column!r} is read with {' and '.join(other.required)}; beside "
                f"{' and '.join(schema.required)} it would be lost, rename or remove it (see docs/data.md)"
            )


def _likeness(schema: Schema, present: Collection[str]) -> float:
    """How much of a schema is there: required columns by their spelling, and the share of optional ones."""
    required = [max((_ratio(name, other) for other in present), default=0.0) for name in schema.required]
    optional = [name in present for name in schema.optional]
    return sum(required) / len(required) + sum(optional) / max(1, len(optional))


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
