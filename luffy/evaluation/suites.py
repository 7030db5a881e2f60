"""The problems of a benchmark, wherever its rows are.

Rows come from `$LUFFY_CACHE/benchmarks/NAME.parquet` (or .jsonl) where there is such a file, in the benchmark's own
columns or in any schema of docs/data.md, and from the Hugging Face data set otherwise. LUFFY's own files
(`valid.all.parquet`) can stand in: `luffy eval --data` takes one as it is.
"""

from collections.abc import Iterator
from typing import Any

from luffy.data.load import convert, unique
from luffy.data.problem import DataError, Problem
from luffy.data.rows import SUFFIXES, SourceRow, read_rows
from luffy.embedded import cache_dir
from luffy.errors import UserError, first_line
from luffy.evaluation.benchmarks import NAMES, Benchmark


def problems_of(name: str, *, seed: int = 0, limit: int | None = None) -> list[Problem]:
    """Of a benchmark, in order. seed: of the order of options, 0: as they are.

    Raises:
        UserError: it is neither here nor to be downloaded, with the file to place and where; or rows that are not its.
    """
    if name == "quick":
        return quick(limit)
    benchmark = NAMES[name]
    places = [cache_dir() / "benchmarks" / f"{name}{suffix}" for suffix in SUFFIXES]
    place = next((path for path in places if path.is_file()), None)
    try:
        found = list(_problems(benchmark, place or benchmark.source, benchmark.split if place is None else None, seed))
    except (DataError, OSError) as error:
        if place is not None:
            raise UserError(f"eval: {error}") from error
        raise UserError(
            f"eval: {benchmark.title} cannot be downloaded ({first_line(error):.200}); place its rows at "
            f"{places[0]} (or .jsonl), with the columns {', '.join(benchmark.columns)} of {benchmark.source} or in a "
            f"schema of docs/data.md"
        ) from error
    return found[:limit]


def _problems(benchmark: Benchmark, source: Any, split: str | None, seed: int) -> Iterator[Problem]:
    rows = list(read_rows(source, split))
    if not rows:
        raise DataError(f"{source}: no rows")
    if set(benchmark.columns) <= set(rows[0].values):
        return unique(_read(benchmark, row, at, seed) for at, row in enumerate(rows))
    return unique(problem for _, _, problem in convert(rows))


def _read(benchmark: Benchmark, row: SourceRow, at: int, seed: int) -> Problem:
    try:
        question, answer = benchmark.read(row.values, seed)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        kind = type(error).__name__
        raise DataError(f"{row.where}: not a row of {benchmark.title} ({kind}: {error})") from error
    if not question or not answer:
        raise DataError(f"{row.where}: {benchmark.title}'s row has no {'answer' if question else 'question'}")
    messages = ({"role": "user", "content": question},)
    return Problem(id=f"{benchmark.name}/{at}", data_source=benchmark.name, messages=messages, answer=answer)


def quick(limit: int | None) -> list[Problem]:
    """The quickstart's held-out problems."""
    from luffy.config_file import load_config
    from luffy.data import load_problems
    from luffy.sources import evaluation_sources

    return load_problems(evaluation_sources(load_config("quickstart"))["heldout"], limit=limit)
