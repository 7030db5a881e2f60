"""Seconds by phase, and the peak of memory."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Phases:
    """`with phases("rollout"): ...` adds up seconds by name."""

    def __init__(self, entered: Callable[[str], None] = lambda name: None) -> None:
        """entered: told the name of each phase when it begins."""
        self._entered = entered
        self.by_name: dict[str, float] = {}
        self.idle: dict[str, float] = {}
        """Seconds that either side waited for the other, where sampling runs ahead of the update."""
        self.events: list[tuple[str, float, float]] = []
        """(name, time.time() when it began, seconds)"""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._entered(name)
        clock, began = time.time(), time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        self.by_name[name] = self.by_name.get(name, 0.0) + seconds
        self.events.append((name, clock, seconds))

    def aside(self, name: str, began: float, seconds: float) -> None:
        """What went on beside the phases: for the timeline, and in no sum. began: time.time()."""
        self.events.append((name, began, seconds))

    @property
    def total(self) -> float:
        return sum(self.by_name.values())

    def seconds(self) -> dict[str, float]:
        return {f"timing_s/{name}": value for name, value in self.by_name.items()} | {"timing_s/step": self.total}


def peak_memory_gib() -> float:
    """Of the device, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
