"""Ctrl-C at a step's end."""

import signal

from luffy.console import say


class StopOnInterrupt:
    """The first Ctrl-C lets the step finish and saves; the second is an ordinary one."""

    def __init__(self) -> None:
        self.asked = False
        self._before = signal.signal(signal.SIGINT, self._ask)

    def restore(self) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        self.asked = True
        self.restore()
        say("\nstopping after this step and saving; press Ctrl-C again to stop at once")
