"""Sampling ahead of the update: while the trainer works on a batch, a thread has the next ones sampled and graded.

With `rollout.max_staleness` = k the thread is at most k batches ahead, so a batch is begun when no more than k steps
lie between the weights that sample it and those that learn from it. Requests that are under way when new weights come
go on with these; each answer says which of its tokens came from which version.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Queue
from typing import Any, Generic, TypeVar

T = TypeVar("T")
CLOSE_S = 15.0


@dataclass(frozen=True, slots=True)
class Made(Generic[T]):
    step: int
    value: T
    began: float
    """time.time()"""
    seconds: float
    waited: float
    """Seconds that the thread had nothing to do before it began."""


class Ahead(Generic[T]):
    """Calls make(step) for one step after another, from `first` to `last`, at most `depth` steps ahead of `next`."""

    def __init__(self, make: Callable[[int], T], first: int, last: int, depth: int) -> None:
        self._make, self._last = make, last
        self._made: Queue[Made[T] | BaseException] = Queue()
        self._allowed = threading.Semaphore(depth)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first,), name="ahead", daemon=True)
        self._thread.start()

    def next(self) -> Made[T]:
        """Of the next step, in order; waits for it. From now on another step may be begun.

        Raises:
            Whatever `make` raised.
        """
        self._allowed.release()
        found = self._made.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self, abort: Callable[[], None] = lambda: None) -> None:
        """Make nothing more. abort: ends what `make` waits for; called until it waits for nothing, as it may begin one
        thing after another. It is not waited for longer than `CLOSE_S`."""
        self._closing.set()
        self._allowed.release()
        deadline = time.monotonic() + CLOSE_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            abort()
            self._thread.join(timeout=0.2)

    def _run(self, step: int) -> None:
        waiting = time.monotonic()
        while step <= self._last:
            self._allowed.acquire()
            if self._closing.is_set():
                return
            clock, began = time.time(), time.monotonic()
            try:
                value = self._make(step)
            except BaseException as error:
                self._made.put(error)
                return
            ended = time.monotonic()
            self._made.put(Made(step, value, clock, ended - began, began - waiting))
            waiting, step = ended, step + 1

    def __enter__(self) -> "Ahead[T]":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
