"""One worker process of the pool and the pipe to it: start, send, receive, kill.

A fresh interpreter is started (never a fork: the parent has torch's threads and perhaps a GPU), in a session of its
own, so that Ctrl-C in the terminal reaches only the parent. Deliberately absent: scheduling (pool.py).
"""

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from luffy.rewards.golds import Answer

START_LIMIT_S = 120.0


class Slot:
    """A worker process that is `starting`, `idle` or `busy`; `deadline` is a `time.monotonic()` value, in seconds."""

    def __init__(self, grader: str, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.job: int | None = None
        self.gold: Answer | None = None
        """Of the job that it was sent last."""
        self.ready = False
        self.deadline = time.monotonic() + START_LIMIT_S
        command = [sys.executable, "-P", "-m", "luffy.rewards.worker", grader, str(timeout_s)]
        # The parent's import path as it is now: a grader named by import path is found where the parent finds it.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )

    def fileno(self) -> int:
        """Descriptor of the reply pipe, for a selector."""
        assert self.process.stdout is not None, "slot: no reply pipe"
        return self.process.stdout.fileno()

    def send(self, job: int, response: str, answer: Answer) -> bool:
        """Hand over a job and start its clock; False when the process is gone."""
        assert self.process.stdin is not None, "slot: no request pipe"
        self.job, self.deadline = job, time.monotonic() + self.timeout_s
        line = json.dumps([response, answer if isinstance(answer, str) else list(answer)]) + "\n"
        try:
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        except OSError:
            self.job = None
            return False
        return True

    def receive(self) -> dict[str, Any] | None:
        """The next reply, None at end of file or for half a line: the process died."""
        assert self.process.stdout is not None, "slot: no reply pipe"
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def kill(self) -> None:
        """SIGKILL to the worker and what it started, reap, close the pipes; harmless on a process that is gone."""
        if self.process.returncode is None:  # not reaped yet, so the number is still its own
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # closing flushes what a dead process never read
                pass
