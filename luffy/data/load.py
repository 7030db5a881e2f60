"""Load problems from parquet and jsonl files, a folder of them, or a Hugging Face data set."""

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from luffy.data.columns import encodable
from luffy.data.problem import DataError, Problem
from luffy.data.rows import SourceRow, read_rows
from luffy.data.schemas import Schema, find_schema

COUNTED = 100_000
"""Rows after one that is refused, of which it is said how many are."""


def load_problems(source: str | Path, *, split: str | None = None, limit: int | None = None) -> list[Problem]:
    """Problems of a source, in its order.

    Args:
        source: a .parquet or .jsonl file in one of `luffy.data.schemas`, a folder of such files, or a Hugging Face data
            set id (`owner/name`, or `owner/name:config`).
        split: in a folder the file of that name (`train.parquet`, `train-00000-of-00002.parquet`); in a file the rows
            whose `extra_info.split` says so; of a data set its split (`train` when None).
        limit: keep the first so many problems.

    Raises:
        DataError: in one sentence, what is wrong in which file and row.
        ValueError: limit is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"load_problems: limit must be at least 1, got {limit}")
    found = (problem for _, _, problem in convert(read_rows(source, split)))
    problems = list(islice(unique(found), limit))
    if not problems:
        raise DataError(f"{source}: no rows")
    return problems


def convert(rows: Iterable[SourceRow]) -> Iterator[tuple[SourceRow, Schema, Problem]]:
    """Each row, the schema it is in, and the problem it is.

    Raises:
        DataError: a row is refused; it says of how many of the others the same is true.
    """
    columns, schema = None, None
    rows = iter(rows)
    for row in rows:
        if schema is None or row.values.keys() != columns:
            columns, schema = set(row.values), find_schema(row.values, row.where)
        try:
            problem = _read(schema, row)
        except DataError as error:
            raise _with_count(error, schema, rows) from None
        yield row, schema, problem


def _read(schema: Schema, row: SourceRow) -> Problem:
    problem = schema.read(row.values, name=row.name, number=row.number, where=row.where)
    encodable("".join([*(turn["content"] for turn in problem.messages), *problem.traces, *problem.answer]), row.where)
    return problem


def _with_count(error: DataError, schema: Schema, rows: Iterator[SourceRow]) -> DataError:
    """The same, with the number of rows after it that are refused too, as far as they can be read."""
    others = looked_at = 0
    try:
        for row in islice(rows, COUNTED):
            looked_at += 1
            try:
                _read(schema, row)
            except DataError:
                others += 1
    except DataError:
        pass  # the rest is unreadable; the first error is what to mend first
    return DataError(f"{error}; of {looked_at} rows after it {others} are refused too" if others else str(error))


def unique(problems: Iterable[Problem]) -> Iterator[Problem]:
    """Number repeated ids: evaluation files repeat a row k times to average over k samples."""
    seen: dict[str, int] = {}
    for problem in problems:
        seen[problem.id] = times = seen.get(problem.id, 0) + 1
        yield problem if times == 1 else dataclasses.replace(problem, id=f"{problem.id}#{times}")
