"""Ranks that look after each other: a death, a hang or a wish to stop on one of them is known to all within seconds.

A thread of every rank writes down where the rank is (key `rank/N` of the job's store) and looks for what the others
have to say, about five small store operations per `poll_s`:

    failed     why the job ends, written once by the first who knows; everyone who reads it exits with its code
    stop       Ctrl-C or SIGTERM reached some rank; everyone finishes the step (`StopOnInterrupt`)
    stopping   how many ranks know that

A collective that waits for a dead peer cannot be interrupted from Python, so "exits" means os._exit. What this cannot
see: a rank that runs and computes the wrong thing, and a hang while `hang_s` is None.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, Self

import torch.distributed as dist

from luffy.errors import first_line
from luffy.failure import Failure
from luffy.hang import describe_hang
from luffy.interrupt import StopOnInterrupt, Stopped

MISSES = 3  # store errors in a row after which the store counts as gone
FAREWELL_S = 3.0  # that a rank waits for the others to have heard why it leaves
CAUSE_S = 1.5  # that an unexpected error waits for a better explanation; an agent looks every 0.1 s


@dataclass(frozen=True, slots=True)
class _Phase:
    name: str
    step: int
    order: int
    """Of the phases of this step."""
    since: float
    """time.time(): other ranks read it."""
    began: float
    """time.monotonic()."""


class Watchdog:
    """Watches over `size` ranks from this one; made, started and closed on all of them.

    store: the job's store; the watchdog uses clones of it, because a client blocks while another thread waits on it.
        Alone (size 1) it is not touched.
    hang_s: seconds after which a phase counts as hanging; None: never.
    quorum_s: seconds within which all ranks must have heard of a SIGTERM. An agent sends one both for pre-emption and
        when a rank has died; in the second case somebody is missing.
    lost_s: seconds without a sign of life after which a rank counts as dead: a whole node that is gone leaves nobody
        who could tell. Long, because C code may hold the interpreter for a while.
    """

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        size: int,
        stop: StopOnInterrupt,
        *,
        hang_s: float | None = None,
        poll_s: float = 1.0,
        quorum_s: float = 8.0,
        lost_s: float = 120.0,
    ) -> None:
        self._rank, self._size, self._stop = rank, size, stop
        self._hang_s, self._poll_s, self._quorum_s, self._lost_s = hang_s, poll_s, quorum_s, lost_s
        self._phase: _Phase | None = None
        self._beat = 0
        self._marked = self._all_stop = self._hang_seen = False
        self._leaving = threading.Lock()  # held by the thread that ends the process, and never released
        self._neighbour = (rank + 1) % size
        self._heard = (b"", time.monotonic())
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        if size > 1:
            assert store is not None, "many ranks have a store"
            self._store, self._mains_store = _client(store, lost_s), _client(store, lost_s)

    def start(self) -> Self:
        if self._size > 1 or self._hang_s is not None:
            self._thread.start()
        return self

    def close(self) -> None:
        """End the watch, after the last thing that ranks do together; safe to call twice.

        A rank that has closed is not missed, and does not mind when the store goes away with the rank that hosts it.
        """
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)  # it may wait for a store that is gone
        if self._size > 1:
            with suppress(RuntimeError):  # the store's host may be gone already
                self._mains_store.set(f"rank/{self._rank}", json.dumps({"done": True}))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def phase(self, name: str | None, step: int | None = None) -> None:
        """This rank is in `name` from now on (None: in nothing that could hang). All ranks go through the same phases.

        Costs nothing: the thread writes it down.
        """
        if name is None:
            self._phase = None
            return
        last = self._phase
        step = step if step is not None else last.step if last else 0
        order = last.order + 1 if last and last.step == step else 0
        self._phase = _Phase(name, step, order, time.time(), time.monotonic())

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what ranks do together: an exception on one of them ends all, with its message and exit code.

        Alone the exception passes, and so does `Stopped` always: all ranks have agreed on that one.
        """
        try:
            yield
        except Stopped:
            self.close()
            raise
        except BaseException as error:
            if self._size == 1:
                raise
            self.failed(error)

    def failed(self, error: BaseException) -> NoReturn:
        """Tell the others why this rank ends, say it, and end the process. To be called on the main thread.

        With many ranks that go down together the first one is heard. What looks like a consequence (a connection
        closed by a peer) gives way to whoever knows the cause.
        """
        failure, since = Failure.of(error, self._rank), time.monotonic()
        # from now on SIGTERM only tells that an agent has seen a rank die
        signal.signal(signal.SIGTERM, lambda *_: setattr(self._stop, "sigterm_at", time.monotonic()))
        if failure.code == 1 and self._has_another_cause(since):
            failure = failure.as_secondary()
        self._leaving.acquire()
        standing = self._announce(failure, self._mains_store)
        if standing == failure and failure.code == 1 and not failure.secondary:
            traceback.print_exception(error)
        self._leave(standing, self._mains_store)

    def _run(self) -> None:
        """Of the thread."""
        misses = 0
        while not self._closing.wait(self._poll_s):
            try:
                self._poll()
                misses = 0
            except RuntimeError as error:  # torch's store errors are all of this kind
                misses += 1
                if misses == MISSES:
                    text = f"lost the job's store: {first_line(error)}"
                    self._leaving.acquire()
                    self._leave(Failure(rank=self._rank, message=text, code=1, secondary=True), None)

    def _poll(self) -> None:
        if self._size > 1:
            self._beat += 1
            self._store.set(f"rank/{self._rank}", json.dumps(self._status()))
            if self._store.check(["failed"]):
                self._leaving.acquire()
                self._leave(Failure.parse(self._store.get("failed")), self._store)
            self._stop_together()
            self._listen_to_neighbour()
        phase = self._phase
        if phase and self._hang_s is not None and time.monotonic() - phase.began > self._hang_s:
            self._report_hang(phase)

    def _status(self) -> dict[str, Any]:
        phase = self._phase
        where = {"phase": phase.name, "step": phase.step, "order": phase.order, "since": phase.since} if phase else {}
        return {"beat": self._beat, "stopping": self._marked, **where}

    def _stop_together(self) -> None:
        if not self._marked:
            if self._stop.asked or self._store.check(["stop"]):
                mine = "preempted" if self._stop.preempted else "interrupted"
                kind = self._store.compare_set("stop", "", mine).decode()  # what stands, whoever was first
                self._stop.ask(preempted=kind == "preempted")
                self._marked = True
                self._store.add("stopping", 1)
            return
        asked = self._stop.sigterm_at
        if asked is None or self._all_stop or time.monotonic() - asked < self._quorum_s:
            return
        self._all_stop = True
        if self._store.add("stopping", 0) < self._size:
            heard = {rank: status.get("stopping") or status.get("done") for rank, status in self._statuses().items()}
            if missing := [rank for rank, known in heard.items() if not known]:
                self._end(Failure(rank=missing[0], message="is gone", code=1, secondary=True))

    def _listen_to_neighbour(self) -> None:
        """Each rank listens to the next one, so that all are heard at a cost that does not grow with their number."""
        key = f"rank/{self._neighbour}"
        said, now = (self._store.get(key) if self._store.check([key]) else b""), time.monotonic()
        if said != self._heard[0] or (said and json.loads(said).get("done")):
            self._heard = said, now
        elif now - self._heard[1] > self._lost_s:
            where = json.loads(said or b"{}").get("phase")
            doing = f" in `{where}`" if where else ""
            text = f"has not been heard of for {now - self._heard[1]:.0f} s{doing}; its node may be down"
            self._end(Failure(rank=self._neighbour, message=text, code=1))

    def _report_hang(self, phase: _Phase) -> None:
        """Once for all ranks, by the first who waits for too long; those who hold up the others show where they are."""
        if self._hang_seen:
            return
        self._hang_seen = True
        if self._size > 1 and self._store.add("hang", 1) > 1:
            return  # another one is at it
        statuses = self._statuses() if self._size > 1 else {}
        message, culprits = describe_hang(statuses | {self._rank: self._status()}, time.time())
        stacks = tuple({*culprits[:4], self._rank})
        self._end(Failure(rank=culprits[0], message=message, code=1, stacks=stacks))

    def _statuses(self) -> dict[int, dict[str, Any]]:
        keys = {rank: f"rank/{rank}" for rank in range(self._size)}
        known = {rank: key for rank, key in keys.items() if self._store.check([key])}
        values = self._store.multi_get(list(known.values()))
        return {rank: {} for rank in keys} | dict(zip(known, map(json.loads, values), strict=True))

    def _has_another_cause(self, since: float) -> bool:
        """Whether a rank of this node was seen to die (its agent then sends SIGTERM), or another one has spoken."""
        while time.monotonic() < since + CAUSE_S:
            with suppress(RuntimeError):
                if self._mains_store.check(["failed"]):
                    return True
            if self._stop.sigterm_at is not None and self._stop.sigterm_at > since - CAUSE_S:
                return True
            time.sleep(0.05)
        return False

    def _end(self, failure: Failure) -> NoReturn:
        self._leaving.acquire()
        if self._size == 1:
            print(failure.sentence(1), file=sys.stderr)
            self._leave(failure, None)
        self._leave(self._announce(failure, self._store), self._store)

    def _announce(self, failure: Failure, store: dist.Store) -> Failure:
        """The failure that stands: this one, or that of whoever was earlier."""
        try:
            standing = Failure.parse(store.compare_set("failed", "", failure.dump()))
        except RuntimeError:
            return failure
        if standing == failure and "LUFFY_LAUNCHER" not in os.environ:  # which says it itself
            print(failure.sentence(self._size), file=sys.stderr)
        return standing

    def _leave(self, failure: Failure, store: dist.Store | None) -> NoReturn:
        if self._rank in failure.stacks:
            print(f"luffy: rank {self._rank} is here:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        failure.save()
        if store is not None:
            with suppress(RuntimeError):  # who hosts the store stays until the others have heard
                store.add("gone", 1)
                deadline = time.monotonic() + FAREWELL_S
                while store.add("gone", 0) < self._size and time.monotonic() < deadline:
                    time.sleep(0.05)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failure.code)


def _client(store: dist.Store, timeout_s: float) -> dist.Store:
    client = dist.PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined]
    client.set_timeout(timedelta(seconds=timeout_s))
    return client
