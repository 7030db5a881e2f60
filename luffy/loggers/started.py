"""The trainer's side: a process for each logger of `log.to`."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from luffy.config import LogConfig
from luffy.console import say
from luffy.errors import UserError

CLOSE_S, STOPPED_S = 120.0, 10.0
"""How long loggers may take to hand on what is left: at a run's end, and where it was stopped or failed."""
SILENT_S = 2.0
"""How long of that goes without a word."""
BEHIND_S = 300.0
"""How long a step may wait for a logger before it counts as lost."""
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

    def __init__(self, run: Path, config: LogConfig) -> None:
        self._run, self._config = run, config
        self._loggers: list[_Logger] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(STOPPED_S if kind else CLOSE_S)

    def start(self) -> None:
        """Once the run folder has its configuration and its logs."""
        for name in self._config.to:
            self._loggers.append(_Logger(self._run, name, name in self._config.online))

    def counts(self, step: int) -> dict[str, float]:
        """To be asked once a step. Records that were not taken so far, over all loggers."""
        return {"log/lost": float(sum(logger.lost(step) for logger in self._loggers))}

    def close(self, limit_s: float = CLOSE_S) -> None:
        try:
            for logger in self._loggers:
                logger.tell()
            self._wait(limit_s)
        finally:  # whatever interrupts the wait, a second Ctrl-C for one
            for logger in self._loggers:
                logger.kill()

    def _wait(self, limit_s: float) -> None:
        begin = time.monotonic()
        slow = [logger.name for logger in self._loggers if not logger.ends_by(begin + SILENT_S)]
        if slow:
            say(f"waiting for {', '.join(slow)}, at most {limit_s:.0f} s; Ctrl-C ends it, and metrics.jsonl has all")
        for logger in self._loggers:
            logger.ends_by(begin + limit_s)
            logger.judge(limit_s)


class _Logger:
    def __init__(self, run: Path, name: str, online: bool) -> None:
        self.name = name
        self._run, self._online, self._warned = run, online, False
        self._waiting: list[tuple[int, float]] = []  # steps that it has not taken, and since when
        # a session of its own: Ctrl-C is for the trainer, which then says when to end
        self._process = subprocess.Popen(
            [sys.executable, "-m", "luffy.loggers", str(run), name, "--follow"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def lost(self, step: int) -> int:
        """Up to this step; the first is told."""
        refused, why, newest = self._noted()
        now, ended = time.monotonic(), self._process.poll()
        self._waiting = [(one, since) for one, since in [*self._waiting, (step, now)] if one > newest]
        late = [one for one, since in self._waiting if ended is not None or now - since > BEHIND_S]
        if ended is not None:
            self._warn(why or f"it ended with code {ended}")
        elif late:
            self._warn(why or f"it has not taken step {late[0]} in {BEHIND_S / 60:.0f} min")
        elif refused:
            self._warn(why)
        return refused + len(late)

    def tell(self) -> None:
        """That nothing will follow."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")  # processes forked since may hold the pipe open
            self._process.stdin.close()

    def ends_by(self, until: float) -> bool:
        """until: as `time.monotonic` has it."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(until - time.monotonic(), 0.0))
        return self._process.returncode is not None

    def judge(self, limit_s: float) -> None:
        """Warn of what it has not taken in the end."""
        refused, why, _ = self._noted()
        code = self._process.returncode
        if code is None:
            self._warn(f"it was not done {limit_s:.0f} s after the last record", at_end=True)
        elif code or refused:
            self._warn(why or f"it ended with code {code}", at_end=True)

    def kill(self) -> None:
        """With all that it has started; nothing where it has ended."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _noted(self) -> tuple[int, str, int]:
        """(records that were not taken, why, newest step that was handed on), as the process has noted."""
        with suppress(OSError, ValueError):
            note = json.loads((self._run / "loggers" / f"{self.name}.json").read_text())
            if note["pid"] == self._process.pid:  # else that of an earlier process
                return note["lost"], note["why"], note["step"]
        return 0, "", 0

    def _warn(self, why: str, at_end: bool = False) -> None:
        """Once."""
        if not self._warned:
            command = [sys.executable, "-m", "luffy.loggers", str(self._run), self.name]
            say(
                f"warning: {self.name} {'did' if at_end else 'does'} not take all metrics ({why}); metrics.jsonl has "
                f"them{'' if at_end else ', training goes on'}; "
                f"`{shlex.join(command + ['--online'] * self._online)}` hands them on later"
            )
        self._warned = True
