"""Tasks from one queue, asked of all servers at once: whoever is free takes the next, and what a server that died or
hangs had taken goes back into the queue.
"""

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Generic, Self, TypeVar

from luffy.console import say
from luffy.errors import UserError
from luffy.rollout.client import Client, Cut, Refused, Unreachable
from luffy.rollout.engine import Completion
from luffy.wording import counted

T = TypeVar("T")
LET_GO_S = 60.0  # for servers, when sampling is stopped
ABORT_S = 5.0  # likewise, when nobody wants what they have
PAUSE_S = 0.5  # before a server that did not answer is asked again
Ask = Callable[[Client, int, str], list[T]]
"""(server, number of the task, id of this request) -> the answer."""


class Aborted(Exception):
    """What was asked for is not wanted any more."""


class Counts:
    """What happened how often, told by any thread."""

    def __init__(self, *names: str) -> None:
        self._counts, self._lock = Counter(dict.fromkeys(names, 0)), threading.Lock()

    def add(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def drain(self) -> dict[str, float]:
        """Since the last time."""
        with self._lock:
            found = dict(self._counts)
            self._counts = Counter(dict.fromkeys(found, 0))
        return {name: float(count) for name, count in found.items()}


class Asking(Generic[T]):
    """`start` asks; `take` has the answers.

    Args:
        tasks: their numbers, in the order in which they are begun.
        ask: raises Unreachable (asked again), Refused (answered with []) or Cut (sampling was ended).
        at_once: requests that a server may have.
        trouble: given the seconds since any server has answered, what ends the run, if anything does.
    """

    def __init__(
        self,
        tasks: Sequence[int],
        ask: Ask[T],
        clients: Sequence[Client],
        *,
        at_once: int,
        trouble: Callable[[float], str | None],
        counts: Counts,
    ) -> None:
        self._ask, self._trouble = ask, trouble
        self._counts = counts
        self._open = set(tasks)  # neither taken nor given back
        self._queue: SimpleQueue[int] = SimpleQueue()
        for task in tasks:
            self._queue.put(task)
        self._answered: SimpleQueue[tuple[int, list[T]] | BaseException] = SimpleQueue()
        self._heard = time.monotonic()  # when any server answered last
        self._flying: dict[str, tuple[Client, int]] = {}
        self._given_up: set[str] = set()  # requests to servers that are silent: asked of others
        self._cut: dict[int, list[Completion]] = {}
        self._ended = threading.Event()
        self._aborted = False
        self._refusals: list[str] = []
        share = max(1, min(at_once, len(self._open)))
        self._threads = [
            (threading.Thread(target=self._serve, args=(client,), name="rollout", daemon=True), client)
            for _ in range(share if tasks else 0)
            for client in clients  # in turn, so that they share what is less than they could take
        ]

    def start(self) -> Self:
        """Begin to ask. Whoever may abort knows of this before: beginning takes as long as the threads need."""
        for thread, _ in self._threads:
            thread.start()
        return self

    @property
    def waiting(self) -> int:
        return len(self._open)

    def take(self, timeout: float) -> list[tuple[int, list[T]]]:
        """(task, answer) of those answered by now; waits up to `timeout` seconds for one.

        Raises:
            UserError: `trouble`.
            Aborted.
        """
        found: list[tuple[int, list[T]]] = []
        deadline = time.monotonic() + timeout
        while self._open and not self._aborted:
            try:
                answer = self._answered.get(timeout=0 if found else min(0.2, max(0.0, deadline - time.monotonic())))
            except Empty:
                if trouble := self._trouble(time.monotonic() - self._heard):
                    self._ended.set()
                    raise UserError(trouble) from None
                self._ask_others()
                if found or time.monotonic() >= deadline:
                    break
                continue
            if isinstance(answer, BaseException):
                self._ended.set()
                raise answer
            if answer[0] in self._open:  # others may have answered it meanwhile
                self._open.discard(answer[0])
                found.append(answer)
        if self._aborted:
            raise Aborted
        if not self._open and not self._ended.is_set():
            self._ended.set()
            if said := self._refusals:
                refused = counted(len(said), "prompt", ("was refused and is", "were refused and are"))
                say(f"rollout: {refused} skipped: {said[0]}")
        return found

    def stop(self) -> dict[int, list[Completion]]:
        """End what is under way; each task that was not taken, with what had been sampled for it. A server that does
        not let go of a task in time keeps what it has."""
        self._let_go(LET_GO_S)
        left: dict[int, list[Completion]] = {task: self._cut.get(task, []) for task in self._open}
        while not self._answered.empty():
            answer = self._answered.get()
            if not isinstance(answer, BaseException) and answer[0] in left:
                left[answer[0]] = answer[1]  # type: ignore[assignment]  # only completions are ever stopped
        self._open.clear()
        return left

    def abort(self) -> None:
        """Whoever takes is told that nothing more comes."""
        self._aborted = True
        self._let_go(ABORT_S)

    def _let_go(self, seconds: float) -> None:
        """Until no server that answers has a request of this any more."""
        self._ended.set()
        deadline = time.monotonic() + seconds
        while (busy := [t for t, c in self._threads if t.is_alive() and not c.away]) and time.monotonic() < deadline:
            self._cut_off(deadline - time.monotonic())  # again: a request may have been on its way to the server
            for thread in busy:
                thread.join(timeout=PAUSE_S / len(busy))

    def _cut_off(self, seconds: float) -> None:
        flying: dict[Client, list[str]] = {}
        for name, (client, _) in list(self._flying.items()):
            if not client.away:
                flying.setdefault(client, []).append(name)

        def cut(client: Client) -> None:
            with suppress(Unreachable, Refused):
                client.abort(flying[client], max(0.1, seconds))

        if flying:  # at once: one that hangs must not keep the others waiting
            with ThreadPoolExecutor(len(flying)) as pool:
                list(pool.map(cut, flying))

    def _ask_others(self) -> None:
        """For what silent servers have; they may still answer."""
        for name, (client, task) in list(self._flying.items()):
            if client.away and name not in self._given_up:
                self._given_up.add(name)
                self._queue.put(task)
                self._counts.add("rollout/asked_again")

    def _serve(self, client: Client) -> None:
        try:
            while not self._ended.is_set():
                if client.away:
                    self._ended.wait(PAUSE_S)
                    continue
                try:
                    task = self._queue.get(timeout=PAUSE_S)
                except Empty:
                    continue  # others may give theirs back
                if not self._ended.is_set():
                    self._serve_one(client, task)
        except BaseException as error:
            self._answered.put(error)

    def _serve_one(self, client: Client, task: int) -> None:
        name = uuid.uuid4().hex
        self._flying[name] = client, task
        try:
            answer = self._ask(client, task, name)
        except Refused as error:
            answer = []
            self._refusals.append(str(error))
            self._counts.add("rollout/refused")
        except Cut as cut:
            self._cut[task] = cut.completions
            return self._again(task, name)
        except Unreachable:
            return self._again(task, name)
        finally:
            del self._flying[name]
        self._heard = time.monotonic()
        self._answered.put((task, answer))

    def _again(self, task: int, name: str) -> None:
        if self._ended.is_set() or name in self._given_up:
            return
        self._queue.put(task)
        self._counts.add("rollout/asked_again")
        self._ended.wait(PAUSE_S)
