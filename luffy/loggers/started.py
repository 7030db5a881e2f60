"""The trainer's side: a process for each logger of `log.to`."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from luffy.config import LogConfig
from luffy.console import say
from luffy.errors import UserError

CLOSE_S = 120.0
"""How long a logger may take to hand on what is left."""
WHERE = {"mlflow": ("MLFLOW_TRACKING_URI",), "trackio": ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")}
"""Variables that say where a logger sends; Weights & Biases has a place of its own."""


def check(config: LogConfig) -> None:
    """Whether all loggers can be started.

    Raises:
        UserError: a package is missing, or what is to send has no address.
    """
    for name in config.to:
        check_one(name, name in config.online)


def check_one(name: str, online: bool) -> None:
    """As `check`, of one logger."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:  # a folder of that name is no package
        extra = "train" if name == "tensorboard" else name
        raise UserError(f'log.to: {name} is not installed; pip install "luffy-rl[{extra}]", or leave it out of log.to')
    if online and name in WHERE and not any(os.environ.get(variable) for variable in WHERE[name]):
        raise UserError(f"log.online: {name} has no address; set {' or '.join(WHERE[name])} in the environment")


class Loggers:
    """The processes of a run. None of them can end it or hold it up, but for `CLOSE_S` at its end."""

    def __init__(self, run: Path, names: Sequence[str]) -> None:
        self._loggers = [_Logger(run, name) for name in names]

    def counts(self) -> dict[str, float]:
        """To be asked once a step. Records that were not taken, over all loggers."""
        return {"log/lost": float(sum(logger.lost() for logger in self._loggers))}

    def close(self) -> None:
        for logger in self._loggers:
            logger.tell()
        until = time.monotonic() + CLOSE_S
        for logger in self._loggers:
            logger.wait(until)


class _Logger:
    def __init__(self, run: Path, name: str) -> None:
        self._run, self._name, self._missed, self._warned = run, name, 0, False
        # a session of its own: Ctrl-C is for the trainer, which then says when to end
        self._process = subprocess.Popen(
            [sys.executable, "-m", "luffy.loggers", str(run), name, "--follow"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def lost(self) -> int:
        """So far; the first is told."""
        refused, why = self._noted()
        ended = self._process.poll()
        self._missed += ended is not None
        if refused or ended is not None:
            self._warn(why or f"it ended with code {ended}")
        return refused + self._missed

    def tell(self) -> None:
        """That nothing will follow."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")  # processes forked since may hold the pipe open
            self._process.stdin.close()

    def wait(self, until: float) -> None:
        """until: as `time.monotonic` has it."""
        try:
            code = self._process.wait(max(until - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._warn(f"it was not done {CLOSE_S:.0f} s after the last record")
            return
        refused, why = self._noted()
        if code or refused:
            self._warn(why or f"it ended with code {code}")

    def _noted(self) -> tuple[int, str]:
        """(records that were not taken, why), as the process has noted."""
        with suppress(OSError, ValueError):
            note = json.loads((self._run / "loggers" / f"{self._name}.json").read_text())
            if note["pid"] == self._process.pid:  # else that of an earlier process
                return note["lost"], note["why"]
        return 0, ""

    def _warn(self, why: str) -> None:
        """Once."""
        if not self._warned:
            say(
                f"warning: {self._name} does not take all metrics ({why}); metrics.jsonl has them, training goes on; "
                f"`python -m luffy.loggers {self._run} {self._name}` hands them on later"
            )
        self._warned = True
