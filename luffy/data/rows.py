"""Rows of parquet and jsonl files, of a folder of them, or of a Hugging Face data set, as they are written there.

Deliberately absent: caching, downloads other than through the `datasets` package.
"""

import gc
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from luffy.data.json_lines import json_lines
from luffy.data.problem import DataError
from luffy.data.schemas import find_schema
from luffy.errors import first_line

SUFFIXES = (".parquet", ".jsonl")


class SourceRow(NamedTuple):
    """where: to name in an error. name: of the file or data set. number: in it, from 0. values: by column."""

    where: str
    name: str
    number: int
    values: Mapping[str, Any]


def read_rows(
    source: str | Path,
    split: str | None = None,
    *,
    skip: int = 0,
    streaming: bool = False,
    revision: str | None = None,
) -> Generator[SourceRow, None, None]:
    """Rows in the source's order, read as they are asked for.

    source, split: as `load_problems` takes them. skip: so many of the first rows.
    streaming: a Hugging Face data set is not downloaded first. revision: of a Hugging Face data set.
    Raises DataError with one sentence.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        yield from islice((row for file in files_of(path, split) for row in _read(file)), skip, None)
    elif path.is_file():
        yield from islice(_of_split(_read(path), split, path), skip, None)
    elif not is_hub_id(source):
        raise DataError(f"{source}: no such file or folder, and not a Hugging Face data set id (owner/name)")
    else:
        options: dict[str, Any] = {"streaming": True} if streaming else {}
        options |= {"revision": revision} if revision else {}
        yield from _hub_rows(str(source), split or "train", skip, options)


def is_hub_id(source: str | Path) -> bool:
    """Whether a source that is no file or folder could be an `owner/name`."""
    if isinstance(source, Path) or Path(source).suffix in SUFFIXES:
        return False
    return source.count("/") == 1 and source[0] not in "./~" and not Path(source).exists()


def files_of(folder: Path, split: str | None) -> list[Path]:
    """Files of a split, in order. Raises DataError where there are none, or it must be said which split is meant."""
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


def _of_split(rows: Iterable[SourceRow], split: str | None, path: Path) -> Iterator[SourceRow]:
    others, matched = set(), False
    for row in rows:
        extra = row.values.get("extra_info")
        here = str((extra if isinstance(extra, Mapping) else {}).get("split", _split_of(path)))
        if split is None or here == split:
            matched = True
            yield row
        others.add(here)
    if split is not None and not matched:
        raise DataError(f"{path}: no rows of split {split!r}, the file holds {', '.join(sorted(others)) or 'none'}")


def _read(path: Path) -> Iterator[SourceRow]:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: the file must end in {' or '.join(SUFFIXES)}")
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)
    return (SourceRow(where, path.stem, number, row) for number, (where, row) in enumerate(rows))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs the pyarrow package ({error})") from error
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            # Checked before the rows, so that a file without any is still told apart from one of another schema.
            find_schema(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=512):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        reason = first_line(error)
        raise DataError(
            f"{path}: unreadable or truncated parquet after row {number}: {reason}; copy or download it again"
        ) from error


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    number = 0
    try:
        with closing(json_lines(path)) as lines:
            for number, where, row in lines:  # noqa: B007 - named below
                yield where, row
    except OSError as error:
        raise DataError(f"{path}: unreadable after line {number}: {error}; copy or download it again") from error


def _hub_rows(source: str, split: str, skip: int, options: Mapping[str, Any]) -> Generator[SourceRow, None, None]:
    name, _, config = source.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"{source}: not a file here, and a Hugging Face data set needs the datasets package (pip install datasets)"
        ) from error
    number, rows = 0, None
    try:
        rows = load_dataset(name, config or None, split=split, **options)
        for number, row in enumerate(rows.skip(skip) if skip else rows, start=skip + 1):
            yield SourceRow(f"{source}, row {number}", source, number - 1, row)
    except Exception as error:  # of whichever of its HTTP clients
        reason = (str(error).splitlines() or ["no reason given"])[0]
        after = f"broke off after row {number}" if number else "offline or no such data set"
        raise DataError(f"{source}: split {split!r} could not be loaded, {after}: {reason}") from error
    finally:
        # Arrow ends the process with an abort where a stream that was not read to its end lives until then.
        del rows
        gc.collect()
