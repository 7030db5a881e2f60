"""Ctrl-C at a step's end."""

import signal
from typing import Self

from luffy.console import say


class StopOnInterrupt:
    """Inside the `with`, the first Ctrl-C sets `asked`, so that the step can finish; the second is an ordinary one."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before)
        say("\nstopping after this step and saving; press Ctrl-C again to stop at once")
