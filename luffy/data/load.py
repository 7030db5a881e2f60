"""Load problems from parquet and jsonl files, a folder of them, or a Hugging Face data set.

Deliberately absent: caching, streaming, downloads other than through the `datasets` package.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from luffy.data.problem import DataError, Problem, check_columns, from_gsm8k, from_luffy

SUFFIXES = (".parquet", ".jsonl")

# (where, row): a place to name in an error, and the row itself
Rows = Iterator[tuple[str, Mapping[str, Any]]]


def load_problems(source: str | Path, *, split: str | None = None, limit: int | None = None) -> list[Problem]:
    """Problems of a source, in its order.

    source: a .parquet or .jsonl file in LUFFY's or GSM8K's schema, a folder of such files, or a Hugging Face data set
        id (`owner/name`, or `owner/name:config`).
    split: in a folder the file of that name (`train.parquet`, `train-00000-of-00002.parquet`); in a file the rows whose
        `extra_info.split` says so; of a data set its split (`train` when None).
    limit: keep the first so many problems.
    Raises DataError with one sentence saying what is wrong, in which file and row.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"load_problems: limit must be at least 1, got {limit}")
    path = Path(source).expanduser()
    if path.is_dir():
        files = _files(path, split)
        found: Iterator[Problem] = (problem for file in files for problem in _read(file))
    elif path.is_file():
        found = _of_split(_read(path), split, path)
    elif isinstance(source, Path) or path.suffix in SUFFIXES or source.count("/") != 1 or source[0] in "./~":
        raise DataError(f"{source}: no such file or folder, and not a Hugging Face data set id (owner/name)")
    else:
        found = _convert(_hub_rows(source, split or "train"), source)
    problems = list(islice(_unique(found), limit))
    if not problems:
        raise DataError(f"{source}: no rows")
    return problems


def _files(folder: Path, split: str | None) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and not file.name.startswith("."))
    splits = sorted({_split_of(file) for file in files})
    if not files:
        raise DataError(f"{folder}: the folder has no {' or '.join(SUFFIXES)} file")
    if split is None and len(splits) > 1:
        # Reading them all would train on what was held out.
        raise DataError(f"{folder}: the folder holds {', '.join(splits)}; say which with split")
    if split is not None and split not in splits:
        raise DataError(f"{folder}: there is no split {split!r}, the folder holds {', '.join(splits)}")
    return [file for file in files if split is None or _split_of(file) == split]


def _split_of(file: Path) -> str:
    return file.stem.split("-")[0]


def _of_split(problems: Iterator[Problem], split: str | None, path: Path) -> Iterator[Problem]:
    if split is None:
        yield from problems
        return
    others, matched = set(), False
    for problem in problems:
        here = str(problem.extra.get("split", _split_of(path)))
        if here == split:
            matched = True
            yield problem
        others.add(here)
    if not matched:
        raise DataError(f"{path}: no rows of split {split!r}, the file holds {', '.join(sorted(others)) or 'none'}")


def _read(path: Path) -> Iterator[Problem]:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: the file must end in {' or '.join(SUFFIXES)}")
    return _convert(_parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path), path.stem)


def _convert(rows: Rows, name: str) -> Iterator[Problem]:
    number = 0
    for number, (where, row) in enumerate(rows):
        convert = from_gsm8k if check_columns(row, where) else from_luffy
        yield convert(row, name=name, number=number, where=where)


def _unique(problems: Iterator[Problem]) -> Iterator[Problem]:
    """Number repeated ids: evaluation files repeat a row k times to average over k samples."""
    seen: dict[str, int] = {}
    for problem in problems:
        seen[problem.id] = times = seen.get(problem.id, 0) + 1
        yield problem if times == 1 else dataclasses.replace(problem, id=f"{problem.id}#{times}")


def _parquet_rows(path: Path) -> Rows:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs the pyarrow package ({error})") from error
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            # Checked before the rows, so that a file without any is still told apart from one of another schema.
            check_columns(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=512):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: unreadable or truncated parquet after row {number}: {reason}") from error


def _jsonl_rows(path: Path) -> Rows:
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}, line {number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{where}: not valid JSON ({error.msg}), is the file cut short?") from error
                if not isinstance(row, dict):
                    raise DataError(f"{where}: must be a JSON object, got {type(row).__name__}")
                yield where, row
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: unreadable after line {number}: {error}") from error


def _hub_rows(source: str, split: str) -> Rows:
    name, _, config = source.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"{source}: not a file here, and a Hugging Face data set needs the datasets package (pip install datasets)"
        ) from error
    try:
        rows = load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise DataError(
            f"{source}: split {split!r} could not be loaded, offline or no such data set: {reason}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}, row {number}", row
