"""How far the asking is: problems, accuracy so far, time left."""

import threading
import time

from luffy.console import Bar, say

LINES = 10
"""Where there is no terminal: lines of a benchmark, at most."""


class QuestionProgress(Bar):
    """total: problems of the benchmark; left: those that are asked now. `add` may be called from any thread."""

    def __init__(self, benchmark: str, total: int, left: int) -> None:
        super().__init__(benchmark, total, total - left)
        self._name, self._total, self._left, self._done = benchmark, total, left, 0
        self._right, self._began, self._lock = 0.0, time.monotonic(), threading.Lock()

    def add(self, accuracy: float | None) -> None:
        """A problem is answered, and so right; None: nobody graded it."""
        with self._lock:
            self._done += 1
            self._right += accuracy or 0.0
            seconds = (time.monotonic() - self._began) / self._done * (self._left - self._done)
            info = f"left {seconds / 60:.1f} min"
            if accuracy is not None:
                info = f"accuracy {self._right / self._done:.1%}  {info}"
            asked = self._total - self._left + self._done
            if self.live:
                self.draw(asked, info)
            elif self._done % max(1, self._left // LINES) == 0:
                say(f"{self._name}: {asked}/{self._total}  {info}")
