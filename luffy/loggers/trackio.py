"""trackio: SQLite in the run folder, or the Space or server that the environment names."""

import os
import warnings
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from typing import Any

from luffy.loggers.sink import Opening


class Trackio:
    appends = True

    def __init__(self, opening: Opening) -> None:
        if not opening.online:
            for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL"):
                os.environ.pop(name, None)
            os.environ["HF_HUB_OFFLINE"] = "1"  # else it asks the hub who the user is
        os.environ["TRACKIO_DIR"] = str(opening.folder.absolute())  # read when the package is imported
        import trackio

        self._said: list[str] = []
        warnings.simplefilter("always")
        warnings.showwarning = self._heard  # type: ignore[assignment]
        # on this machine, how to look at it is docs/metrics.md's: the hint of the library leaves TRACKIO_DIR out
        with nullcontext() if opening.online else redirect_stdout(StringIO()):
            self._run = trackio.init(
                opening.project,
                name=f"{opening.name}-{opening.id}",  # it knows runs by name
                config=opening.config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self.last = self._run._next_step - 1 if opening.online else -1  # no public name has it

    def _heard(self, message: Any, _category: Any, filename: str, *_: Any) -> None:
        """It raises nothing: what it could not do is a warning."""
        if "trackio" in filename:
            self._said.append(str(message))

    def _raise(self) -> None:
        if self._said:
            raise RuntimeError(self._said.pop())

    def write(self, step: int, numbers: dict[str, float], at: float) -> None:
        self._run.log(dict(numbers), step=step)
        self._raise()

    def close(self) -> None:
        self._run.finish()
        self._raise()
