"""A pool of persistent verifier processes with a hard wall clock per answer.

Symbolic comparison can loop for ever or use up memory inside C code, where no exception reaches it. So each answer is
graded in a process that can be killed: past `timeout_s` the worker gets SIGKILL and a fresh one takes its place. A
timeout or a crash scores 0, is counted, and is never raised. Deliberately absent: retries.
"""

import hashlib
import selectors
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from luffy.errors import UserError
from luffy.rewards.golds import Answer, hashable
from luffy.rewards.graders import find_grader
from luffy.rewards.slot import Slot

CACHE_ENTRIES = 100_000
MAX_FAILED_STARTS = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """reward of one answer, and how it came about; `timeout` and `crash` have reward 0."""

    reward: float
    status: Literal["ok", "timeout", "crash"]


class VerifierPool:
    """Grades (response, answer) pairs in worker processes.

    grader: a name in `GRADERS`, or `module:function` for one of your own.
    workers: number of processes. timeout_s: wall-clock seconds for one answer, a worker's start not included.
    `grade` may be called from several threads; one call runs at a time.

    Raises:
        ValueError: the grader cannot be found or imported, workers are below 1, or the timeout is not positive.
    """

    def __init__(self, grader: str, workers: int = 2, timeout_s: float = 5.0) -> None:
        try:
            find_grader(grader)  # the workers import it themselves; a name that leads nowhere is better known now
        except Exception as error:  # importing someone's module can raise anything
            raise ValueError(f"VerifierPool: grader {grader!r} cannot be loaded: {error}") from error
        if workers < 1:
            raise ValueError(f"VerifierPool: workers must be at least 1, got {workers}")
        if timeout_s <= 0:
            raise ValueError(f"VerifierPool: timeout_s must be positive seconds, got {timeout_s}")
        self.grader, self.timeout_s = grader, timeout_s
        self._counters = dict.fromkeys(("graded", "cached", "timeouts", "crashes", "respawns"), 0)
        self._cache: OrderedDict[bytes, Verdict] = OrderedDict()
        self._lock = threading.Lock()
        self._failed_starts = 0
        self._closed = False
        self._slots: list[Slot] = []
        # Also runs at interpreter exit, so that a pool nobody closed leaves no process behind.
        self._finalizer = weakref.finalize(self, _kill_all, self._slots)
        self._slots += [Slot(grader, timeout_s) for _ in range(workers)]

    def grade(self, pairs: Sequence[tuple[str, Answer]]) -> list[Verdict]:
        """One verdict per pair, in order. Equal pairs are graded once; `ok` verdicts are remembered across calls.

        Raises:
            RuntimeError: the pool is closed.
            UserError: its workers cannot start.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("VerifierPool: grade called on a closed pool")
            keys = [_key(response, answer) for response, answer in pairs]
            known = {key: self._cache[key] for key in keys if key in self._cache}
            jobs: dict[bytes, tuple[str, Answer]] = {}
            for key, pair in zip(keys, pairs, strict=True):
                if key not in known:
                    jobs.setdefault(key, pair)
            fresh = dict(zip(jobs, self._run(list(jobs.values())), strict=True)) if jobs else {}
            self._remember({**known, **fresh})
            self._counters["graded"] += len(fresh)
            self._counters["cached"] += len(keys) - len(fresh)
            return [known[key] if key in known else fresh[key] for key in keys]

    def status(self) -> dict[str, Any]:
        """Counts since the start: graded, cached, timeouts, crashes, respawns; and grader, workers, timeout_s."""
        return {**self._counters, "grader": self.grader, "workers": len(self._slots), "timeout_s": self.timeout_s}

    def close(self) -> None:
        """Kill and reap every worker; the pool cannot be used again. Safe to call twice."""
        with self._lock:
            self._closed = True
            self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, jobs: list[tuple[str, Answer]]) -> list[Verdict]:
        verdicts: list[Verdict | None] = [None] * len(jobs)
        waiting = Waiting(jobs)
        unfinished = len(jobs)
        try:
            while unfinished:
                self._hand_out(waiting, jobs)
                for at in self._wait():
                    job, verdict = self._collect(at)
                    if job is not None and verdict is not None:
                        verdicts[job] = verdict
                        unfinished -= 1
        except BaseException:
            # Interrupted half way: a reply still to come would be taken for the next call's.
            for at, slot in enumerate(self._slots):
                if slot.job is not None:
                    self._respawn(at)
            raise
        return [verdict for verdict in verdicts if verdict is not None]

    def _hand_out(self, waiting: "Waiting", jobs: list[tuple[str, Answer]]) -> None:
        for at, slot in enumerate(self._slots):
            if waiting and slot.ready and slot.job is None:
                job = waiting.take(slot.gold)
                slot.gold = jobs[job][1]
                if not slot.send(job, *jobs[job]):
                    # It died while idle, which is not this answer's fault: the answer waits for the next worker.
                    waiting.put_back(job)
                    self._respawn(at)

    def _wait(self) -> list[int]:
        """Indices of slots that have a reply, ended, or are past their deadline."""
        active = [at for at, slot in enumerate(self._slots) if slot.job is not None or not slot.ready]
        with selectors.DefaultSelector() as selector:
            for at in active:
                selector.register(self._slots[at], selectors.EVENT_READ, at)
            nearest = min(self._slots[at].deadline for at in active)
            spoke = {key.data for key, _ in selector.select(max(0.0, nearest - time.monotonic()))}
        now = time.monotonic()
        return [at for at in active if at in spoke or self._slots[at].deadline <= now]

    def _collect(self, at: int) -> tuple[int | None, Verdict | None]:
        """Read slot `at`, or replace it when it is late or dead; returns the job it settled, if any."""
        slot = self._slots[at]
        late = not _has_reply(slot)
        reply = None if late else slot.receive()
        job, slot.job = slot.job, None
        if not slot.ready:
            self._note_start(at, reply)
            return None, None
        if reply is None:
            self._respawn(at)
            self._counters["timeouts" if late else "crashes"] += 1
            return job, Verdict(0.0, "timeout" if late else "crash")
        if "crash" in reply:
            self._counters["crashes"] += 1
            return job, Verdict(0.0, "crash")
        return job, Verdict(reply["reward"], "ok")

    def _note_start(self, at: int, reply: dict[str, Any] | None) -> None:
        if reply is not None and "ready" in reply:
            self._slots[at].ready, self._failed_starts = True, 0
            return
        self._failed_starts += 1
        reason = "it ended or did not answer" if reply is None else reply["failed"]
        self._respawn(at)
        if reply is not None or self._failed_starts >= MAX_FAILED_STARTS:
            raise UserError(f"VerifierPool: a worker for grader {self.grader!r} could not start: {reason}")

    def _respawn(self, at: int) -> None:
        self._slots[at].kill()
        self._slots[at] = Slot(self.grader, self.timeout_s)
        self._counters["respawns"] += 1

    def _remember(self, verdicts: dict[bytes, Verdict]) -> None:
        for key, verdict in verdicts.items():
            # A timeout may be the machine's fault on a busy moment: it is not remembered.
            if verdict.status == "ok":
                self._cache[key] = verdict
                self._cache.move_to_end(key)
        while len(self._cache) > CACHE_ENTRIES:
            self._cache.popitem(last=False)


class Waiting:
    """Those of one gold together where that costs nobody a wait, so that a worker parses a gold once; long golds first,
    so that no worker is left alone with what takes longest."""

    def __init__(self, jobs: Sequence[tuple[str, Answer]]) -> None:
        self._jobs = jobs
        self._by_gold: OrderedDict[Answer, deque[int]] = OrderedDict()
        self._begun: set[Answer] = set()
        for number, (_, gold) in sorted(enumerate(jobs), key=lambda job: -len(str(job[1][1]))):
            self._by_gold.setdefault(hashable(gold), deque()).append(number)

    def __bool__(self) -> bool:
        return bool(self._by_gold)

    def take(self, gold: Answer | None) -> int:
        """One of `gold` if there are any, else of a gold that no other worker has begun, else any."""
        key = "" if gold is None else hashable(gold)
        if gold is None or key not in self._by_gold:
            key = next((one for one in self._by_gold if one not in self._begun), next(reversed(self._by_gold)))
        self._begun.add(key)
        jobs = self._by_gold[key]
        number = jobs.popleft()
        if not jobs:
            del self._by_gold[key]
        return number

    def put_back(self, number: int) -> None:
        """A job that was taken and not begun: the next of its gold, which is the next to be taken at all."""
        key = hashable(self._jobs[number][1])
        self._by_gold.setdefault(key, deque()).appendleft(number)
        self._by_gold.move_to_end(key, last=False)


def _has_reply(slot: Slot) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(slot, selectors.EVENT_READ)
        return bool(selector.select(0))


def _key(response: str, answer: Answer) -> bytes:
    # A digest, so that the cache does not hold every long response; surrogatepass because sampled text is any text.
    text = repr((response, hashable(answer)))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _kill_all(slots: list[Slot]) -> None:
    for slot in slots:
        slot.kill()
