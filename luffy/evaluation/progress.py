"""How far the asking is: problems, accuracy so far, time left."""

import threading
import time
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from luffy.console import is_live, progress, say

LINES = 10
"""Where there is no terminal: lines of a benchmark, at most."""


class Asking:
    """total: problems of the benchmark; left: those that are asked now. `add` may be called from any thread."""

    def __init__(self, benchmark: str, total: int, left: int) -> None:
        self._name, self._total, self._left, self._done = benchmark, total, left, 0
        self._right, self._began, self._lock = 0.0, time.monotonic(), threading.Lock()
        self._live = is_live()
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[info]}"),
        )
        self._progress = Progress(*columns, console=progress)
        self._task = self._progress.add_task(benchmark, total=total, completed=total - left, info="")

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
            if self._live:
                self._progress.update(self._task, completed=asked, info=info)
            elif self._done % max(1, self._left // LINES) == 0:
                say(f"{self._name}: {asked}/{self._total}  {info}")

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._progress.stop()
