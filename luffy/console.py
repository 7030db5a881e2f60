"""What a person sees: a live progress bar on a terminal, one plain line a step elsewhere."""

import logging
import os
import sys
import time
import warnings
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

console = Console(highlight=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Silence what libraries say at start-up; errors still come through."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("vllm", "transformers", "torch.distributed", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def say(text: str) -> None:
    """Once for all ranks."""
    if os.environ.get("RANK", "0") != "0":
        return
    console.print(text, markup=False)


class StepProgress:
    """Progress over training steps: step, reward, held-out accuracy, tokens/s, time left."""

    def __init__(self, total: int, start: int) -> None:
        self._live = console.is_terminal and os.environ.get("RANK", "0") == "0"
        self._total, self._first, self._began = total, start, time.monotonic()
        self._accuracy: float | None = None
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[info]}"),
            console=console,
        )
        self._task = self._progress.add_task("training", total=total, completed=start, info="")

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
        if self._live:
            self._progress.update(self._task, completed=step, info="  ".join(parts))
        else:
            say(f"step {step}/{self._total}  " + "  ".join(parts))

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._progress.stop()
        sys.stdout.flush()


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.2f}"
