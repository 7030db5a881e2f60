"""Ctrl-C and SIGTERM at a step's end."""

import signal
import time
from types import FrameType
from typing import Self

from luffy.console import say


class Stopped(KeyboardInterrupt):
    """The ranks agreed to stop, finished their step and saved. `exit_code`: 0 after SIGTERM, 130 after Ctrl-C."""

    def __init__(self, preempted: bool) -> None:
        super().__init__("stopped by SIGTERM, saved" if preempted else "interrupted")
        self.exit_code = 0 if preempted else 130


class StopOnInterrupt:
    """Inside the `with`, the first Ctrl-C or SIGTERM sets `asked`, so that the step can finish.

    A second Ctrl-C is an ordinary one; a second SIGTERM changes nothing, since schedulers and agents send several.
    `preempted` says that it was SIGTERM, here or on another rank (`Watchdog` carries it from rank to rank). Ranks that
    agree on stopping must agree on both: at a step's end some may not have heard yet.
    """

    def __init__(self) -> None:
        self.asked = False
        self.preempted = False
        self.sigterm_at: float | None = None
        """time.monotonic() of this process's own first SIGTERM."""

    def __enter__(self) -> Self:
        self._before = {
            signal.SIGINT: signal.signal(signal.SIGINT, self._interrupted),
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._terminated),
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ask(self, preempted: bool) -> None:
        """Stop after this step. May be called from any thread; the first call counts."""
        if self.asked:
            return
        self.preempted = preempted
        self.asked = True
        if not preempted:  # a SIGTERM may also mean that another rank is dead and nothing will be finished
            say("\nstopping after this step and saving; press Ctrl-C again to stop at once")

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        self.ask(preempted=False)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        self.sigterm_at = self.sigterm_at or time.monotonic()
        self.ask(preempted=True)
