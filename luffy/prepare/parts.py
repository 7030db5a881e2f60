"""So many rows of the source at a time, each part whole on disk or absent.

A part is a pure function of the options, the source and the parts before it, and the result of the parts: work that was
killed and taken up again ends in the same bytes. Memory is one part's rows, and 16 bytes of each kept question.
"""

import json
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any

from luffy.data.rows import SourceRow, read_rows
from luffy.errors import UserError
from luffy.files import disk_errors, remove_folder, write_json, write_text
from luffy.prepare.options import Options, record
from luffy.prepare.sieve import make_sieve
from luffy.prepare.sift import Sieve, question_key
from luffy.prepare.tally import Tally
from luffy.prepare.write import REPORT, write_result

WORK = ".prepare"
OPTIONS = "options.json"


def prepare(options: Options, out: str | Path, progress: Callable[[Tally], None] = lambda _: None) -> dict[str, Any]:
    """Write `out/train.parquet` (or the split's name) and `out/report.json`; returns the report.

    Goes on where an earlier call with the same options was killed; does nothing when one was finished.
    progress: is given the tally so far after every part.
    Raises UserError when the folder holds the work of other options, DataError when no problem is left.
    """
    out = Path(out)
    wanted, work = record(options), out / WORK
    if (out / REPORT).is_file():
        _refuse_other(out, out / REPORT, wanted, "finished")
        return json.loads((out / REPORT).read_text())
    if _part(work, 0).is_file():
        _refuse_other(out, work / OPTIONS, wanted, "begun")
    with disk_errors(f"cannot write {out}"):
        work.mkdir(parents=True, exist_ok=True)
    write_json(work / OPTIONS, {"options": wanted})
    tally = Tally()
    with ExitStack() as stack:
        sieve = make_sieve(options, stack)
        paths = _resume(work, sieve, tally)
        first = len(paths) * options.part_rows
        source = stack.enter_context(closing(_source(options, wanted["revision"], first)))
        for rows in _batches(source, options.part_rows):
            kept, counts = sieve.sift(rows, first)
            first += len(rows)
            paths.append(_part(work, len(paths)))
            write_text(paths[-1], json.dumps({"tally": counts.record(), "rows": kept}))
            tally.add(counts)
            progress(tally)
    report = write_result(out, options, wanted, tally, (json.loads(path.read_text())["rows"] for path in paths))
    remove_folder(work)
    return report


def _part(work: Path, number: int) -> Path:
    return work / f"part-{number:05}.json"


def _refuse_other(out: Path, file: Path, wanted: dict[str, Any], stage: str) -> None:
    found = json.loads(file.read_text())["options"]
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"{out}: a set was {stage} here with {name} {found.get(name)!r}, now {value!r}; choose another "
                "folder, or remove this one"
            )


def _resume(work: Path, sieve: Sieve, tally: Tally) -> list[Path]:
    """Parts that are there; their counts go to the tally, their questions to the sieve."""
    paths: list[Path] = []
    while (path := _part(work, len(paths))).is_file():
        part = json.loads(path.read_text())
        tally.add(Tally.of(part["tally"]))
        sieve.seen.update(question_key(row["prompt"]) for row in part["rows"])
        paths.append(path)
    return paths


def _source(options: Options, revision: str | None, skip: int) -> Generator[SourceRow, None, None]:
    with closing(read_rows(options.place, options.split, streaming=True, revision=revision, skip=skip)) as rows:
        yield from rows if options.limit is None else islice(rows, max(0, options.limit - skip))


def _batches(rows: Iterator[SourceRow], size: int) -> Iterator[list[SourceRow]]:
    while batch := list(islice(rows, size)):
        yield batch
