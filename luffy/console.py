"""What a person sees. Results go to stdout; progress and warnings to stderr: a live bar on a terminal, plain lines
elsewhere. rich leaves colours out where the stream is no terminal, and heeds NO_COLOR, FORCE_COLOR and TERM=dumb.
"""

import json
import logging
import math
import os
import sys
import time
import warnings
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from luffy.rank import speaks


class Results(Console):
    """Whose reader may go before the end: what then happens is said once, in `luffy.cli`."""

    def on_broken_pipe(self) -> None:
        raise


console = Results(highlight=False, soft_wrap=True)
"""Of results."""
progress = Console(highlight=False, soft_wrap=True, stderr=True)
"""Of progress and warnings."""

QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
"""Variables of libraries, where the user has not set them."""


def be_quiet() -> None:
    """From now on no progress and no warnings."""
    progress.quiet = True


def is_live() -> bool:
    """Whether progress may be drawn over itself. Not what FORCE_COLOR says: a file would hold every frame."""
    return progress.file.isatty() and not progress.is_dumb_terminal and not progress.quiet


def print_json(record: Any) -> None:
    """A document on stdout; numbers that JSON does not have are null."""
    print(json.dumps(_finite(record), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def quiet_libraries() -> None:
    """Silence what libraries say at start-up; errors still come through.

    transformers and huggingface_hub are not imported for that, which takes seconds that a mistyped path should not
    cost: they read variables when they are, and what the user has set is left alone.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("vllm", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ours = QUIET.keys() - os.environ.keys()
    os.environ.update({variable: QUIET[variable] for variable in ours})
    if "transformers" in sys.modules:  # in a notebook: it and the hub's client have read them
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging as transformers_logging

        if "HF_HUB_VERBOSITY" in ours:
            hub_logging.set_verbosity_error()
        if "TRANSFORMERS_VERBOSITY" in ours:
            transformers_logging.set_verbosity_error()
        if "HF_HUB_DISABLE_PROGRESS_BARS" in ours:
            transformers_logging.disable_progress_bar()


def say(text: str) -> None:
    """Progress, or a warning; once for all ranks."""
    if speaks():
        progress.print(text, markup=False)


def tell(text: str) -> None:
    """A line of the result."""
    console.print(text, markup=False)


class Bar:
    """A bar that is drawn inside the `with`, where progress may be drawn; elsewhere whoever has it says lines.

    more: columns behind the count, before the words of `draw`.
    """

    def __init__(self, name: str, total: int, done: int, *more: ProgressColumn) -> None:
        self.live = is_live() and speaks()
        counted = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn())
        self._drawn = Progress(*counted, *more, TextColumn("{task.fields[info]}"), console=progress)
        self._task = self._drawn.add_task(name, total=total, completed=done, info="")

    def draw(self, done: int, info: str) -> None:
        """So much of the total, and words behind it."""
        self._drawn.update(self._task, completed=done, info=info)

    def __enter__(self) -> Self:
        if self.live:
            self._drawn.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self._drawn.stop()


class StepProgress(Bar):
    """Progress over training steps: step, reward, held-out accuracy, tokens/s, time left."""

    def __init__(self, total: int, start: int) -> None:
        super().__init__("training", total, start, TimeElapsedColumn())
        self._total, self._first, self._began = total, start, time.monotonic()
        self._accuracy: float | None = None

    def accuracy(self, value: float) -> None:
        self._accuracy = value

    def step(self, step: int, record: dict[str, float], share: float) -> None:
        """`share`: fraction of the run that is done (by steps or by the time limit, whichever is further)."""
        spent = time.monotonic() - self._began
        begun = self._first / self._total
        left = spent * (1 - share) / max(share - begun, 1e-9)
        parts = [
            f"reward {_number(record.get('on_off_metrics/on_score'))}",
            f"held-out {_number(self._accuracy)}",
            f"p(trace) {_number(record.get('actor/off_policy_prob'))}",
            f"{record.get('perf/tokens_per_s', 0):.0f} tok/s",
            f"{record.get('timing_s/step', 0):.1f} s",
            f"left {left / 60:.1f} min",
        ]
        if self.live:
            self.draw(step, "  ".join(parts))
        else:
            say(f"step {step}/{self._total}  " + "  ".join(parts))


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.2f}"
