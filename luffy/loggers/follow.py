"""From metrics.jsonl and evals.jsonl into a sink, and the note of how far it came.

RUN/loggers/NAME.json   pid: of the process; lost: records that the sink did not take; why: what it said last;
                        step: newest that was handed on; read: of each file the bytes that the sink has and their
                        CRC-32, once it is closed in order

A sink that was closed in order, and whose bytes are still those of the files, is appended to. Any other is built anew
from the files: after a kill, or where a run went back to an earlier checkpoint, it would have steps that are no longer
true. What has been sent elsewhere cannot be taken back: there, only steps later than its newest are written.
"""

import fcntl
import json
import math
import os
import re
import shutil
import time
import zlib
from contextlib import suppress
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from luffy.config_file import load_config
from luffy.errors import UserError, first_line
from luffy.files import write_json
from luffy.loggers.sink import Opening, Sink, without_secrets

SINKS = {
    "tensorboard": "tensorboard:TensorBoard",
    "wandb": "wandb:Wandb",
    "mlflow": "mlflow:Mlflow",
    "trackio": "trackio:Trackio",
}
"""Module of this package and class, by the name in `log.to`, which is also that of the package that it needs."""
METRICS, EVALS = "metrics.jsonl", "evals.jsonl"
NEEDED = {METRICS: {"step"}, EVALS: {"step", "name"}}
"""Keys of every record."""
LOCK_S = 150.0
"""How long to wait for an earlier process; its trainer kills it sooner."""


class Tail:
    """Whole lines of a file as it grows. The file is held open: one that replaces it belongs to a later process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] = path.open("rb") if path.exists() else BytesIO()
        self._rest = b""
        self.bytes = self.crc = self._lines = 0

    def starts_with(self, size: int, crc: int) -> bool:
        """Before the first `read`."""
        begin = self._file.read(size)
        self._file.seek(0)
        return len(begin) == size and zlib.crc32(begin) == crc

    def read(self, size: int = -1) -> list[dict[str, Any]]:
        """Records that are new, or those of the next `size` bytes.

        Raises:
            UserError: a whole line is no record.
        """
        whole, end, self._rest = (self._rest + self._file.read(size)).rpartition(b"\n")
        lines = whole + end
        self.bytes, self.crc = self.bytes + len(lines), zlib.crc32(lines, self.crc)
        return [self._record(line) for line in lines.splitlines()]

    def _record(self, line: bytes) -> dict[str, Any]:
        self._lines += 1
        with suppress(ValueError, AttributeError):
            record: dict[str, Any] = json.loads(line)
            if record.keys() >= NEEDED[self._path.name]:
                return record
        raise UserError(
            f"loggers: line {self._lines} of {self._path} is no record: expected a JSON object with "
            f"{' and '.join(sorted(NEEDED[self._path.name]))}, got {line[:40]!r}; take the line out, then hand the run "
            f"on again"
        )


class Follower:
    """Hands the records of a run to one sink."""

    def __init__(self, run: Path, name: str, online: bool | None = None, wait: bool = True) -> None:
        """online: whether the sink may send; null: what the run's configuration says. wait: for a process that still
        follows the same run into the same sink.

        Raises:
            UserError: there is no run, or another process follows it.
        """
        if not (run / "config.toml").is_file():
            raise UserError(f"loggers: {run} holds no run; name the folder that has its config.toml")
        config = load_config(str(run / "config.toml"))
        self.name, self.lost, self.why = name, 0, ""
        self._run, self._notes = run, run / "loggers"
        self._notes.mkdir(exist_ok=True)
        self._lock = self._hold(LOCK_S if wait else 0.0)
        self._tails = {file: Tail(run / file) for file in (METRICS, EVALS)}
        self._opening = Opening(
            folder=run / name,
            project=config.log.project,
            name=config.name,
            id=_id_of(self._notes / "id"),
            config=without_secrets(config.model_dump(mode="json", exclude_none=True)),
            online=name in config.log.online if online is None else online,
        )
        self._newest, self._minutes = 0, 0.0
        self._noted = 0  # step
        self._early: list[tuple[int, bool, dict[str, Any]]] = []

    def _hold(self, limit_s: float) -> IO[str]:
        file = (self._notes / f".{self.name}.lock").open("w")
        until = time.monotonic() + limit_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise UserError(
                        f"loggers: another process{self._whose()} hands {self._run} to {self.name}; wait until it "
                        f"ends, or end it"
                    ) from None
            time.sleep(0.2)

    def _whose(self) -> str:
        with suppress(OSError, ValueError, KeyError):
            return f" ({json.loads((self._notes / f'{self.name}.json').read_text())['pid']})"
        return ""

    def open(self) -> None:
        """Open the sink, and find out what it has already."""
        read = self._read_before()
        self._write_note()
        module, _, name = SINKS[self.name].partition(":")
        sink = getattr(import_module(f"luffy.loggers.{module}"), name)
        if read and sink.appends:
            self._remember(self._tails[METRICS].read(read[METRICS][0]))
            self._tails[EVALS].read(read[EVALS][0])
        elif not self._opening.online:
            shutil.rmtree(self._opening.folder, ignore_errors=True)
        self._sink: Sink = sink(self._opening)

    def _read_before(self) -> dict[str, list[int]] | None:
        """What the note says, if it is still true."""
        with suppress(OSError, ValueError, KeyError):
            note = json.loads((self._notes / f"{self.name}.json").read_text())
            read = note["read"] if note["online"] == self._opening.online else None
            if read and all(tail.starts_with(*read[file]) for file, tail in self._tails.items()):
                return read
        return None

    def hand_on(self, last: bool = False) -> None:
        """What is new in the files, in order of steps. last: nothing will follow."""
        before = self._minutes
        metrics = self._tails[METRICS].read()
        self._remember(metrics)
        found = [(record["step"], False, record) for record in metrics] + self._early
        found += [(record["step"], True, record) for record in self._tails[EVALS].read()]
        # an evaluation of a later step, written between the two reads, waits for the metrics of its step
        ready = [one for one in found if last or one[0] <= self._newest]
        self._early = [] if last else [one for one in found if one[0] > self._newest]
        now, minutes = time.time(), before
        for step, is_eval, record in sorted(ready, key=lambda one: one[:2]):
            minutes = record.get("perf/train_minutes") or minutes
            if step > self._sink.last:
                self._write(step, numbers(record, is_eval), now - 60 * (self._minutes - minutes))
        if self._newest > self._noted:
            self._write_note()

    def _remember(self, metrics: list[dict[str, Any]]) -> None:
        for record in metrics:
            self._newest = record["step"]
            self._minutes = record.get("perf/train_minutes") or self._minutes

    def _write(self, step: int, values: dict[str, float], at: float) -> None:
        try:
            self._sink.write(step, values, at)
        except Exception as error:  # of whatever kind: the next record may fare better
            self.fail(error)

    def fail(self, error: Exception, lost: int = 1) -> None:
        """Note why the sink did not take a record, or could not be opened."""
        self.lost += lost
        self.why = reason(error)
        self._write_note()

    def close(self) -> None:
        """Hand on the rest; note how far the sink came, if it has everything."""
        self.hand_on(last=True)
        try:
            self._sink.close()
        except Exception as error:
            self.fail(error)
        self._write_note(closed=not self.lost)

    def _write_note(self, closed: bool = False) -> None:
        read = {file: [tail.bytes, tail.crc] for file, tail in self._tails.items()} if closed else None
        self._noted = self._newest
        online = self._opening.online
        write_note(self._run, self.name, why=self.why, lost=self.lost, step=self._newest, online=online, read=read)


def write_note(run: Path, name: str, *, why: str, lost: int = 0, step: int = 0, **more: Any) -> None:
    """RUN/loggers/NAME.json of this process. more: what one that was closed in order is known by."""
    note = {"pid": os.getpid(), "lost": lost, "why": why, "step": step} | more
    write_json(run / "loggers" / f"{name}.json", note)


def reason(error: Exception) -> str:
    """In a line, without secrets."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return without_secrets(kind + first_line(error))


def numbers(record: dict[str, Any], is_eval: bool) -> dict[str, float]:
    """Finite numbers of a line; those of an evaluation as `eval/SET/...`, in characters that every logger takes."""
    prefix = f"eval/{record['name']}/" if is_eval else ""
    return {
        re.sub(r"[^\w./ -]", "_", prefix + key): float(value)
        for key, value in record.items()
        if key != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }


def _id_of(path: Path) -> str:
    """Of the run: written once, whichever logger comes first."""
    if not path.exists():
        with suppress(FileExistsError), path.open("x") as file:
            file.write(uuid4().hex[:12])
    return path.read_text()
