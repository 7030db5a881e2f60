"""Trainer and rollout servers, event by event: a model of `luffy.sampling` and `luffy.rollout.asking`.

A step's prompts wait in one queue, a server takes one with all of its answers when it has room, every sequence that a
server decodes gets a token a decoding step, whose time grows with their number; sampling ends when enough prompts are
done, and the others are carried on; a batch is begun when no more than `ahead` steps lie between it and the one that is
trained on; new weights make servers pause. Left out: prefix caches, preemption, tensor parallelism's own talk (so its
gain is a bound), stragglers among ranks and networks.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import statistics
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Lengths = Callable[[random.Random], int]


@dataclass(frozen=True)
class Rates:
    """Seconds."""

    decode: float
    """A decoding step of a server, apart from its sequences."""
    sequence: float
    """Of a decoding step, for each sequence."""
    prompt: float
    """Before a prompt's first token."""
    update: float
    """Of an update, apart from its tokens."""
    token: float
    """Of an update, for each answer token."""
    sync: float
    """That servers pause for new weights."""
    verify: float = 0.0
    """After a prompt's last answer, until its verdicts are there."""
    slots: int = 256
    """Sequences that a server decodes at a time."""


@dataclass
class Group:
    left: list[float]
    """Tokens that its answers still need."""
    open: int = 0
    tokens: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    """By the version of the weights."""


@dataclass
class Answer:
    group: Group
    end: float
    """Its server's progress when it is finished."""
    told: float
    """Up to which progress its tokens are in its group's."""


@dataclass
class Server:
    room: int
    """Prompts that it can take."""
    progress: float = 0.0
    """Tokens that a sequence which was always there would have."""
    at: float = 0.0
    busy_s: float = 0.0
    running: list[tuple[float, int, Answer]] = field(default_factory=list)
    """Heap of (progress at its end, number, answer)."""
    stamp: int = 0


@dataclass
class Outcome:
    seconds: float
    """A step, once the pipeline is full."""
    trainer: float
    """Share of the time that the trainer updates."""
    servers: float
    """Share of the time that a server decodes anything."""
    staleness: float
    """Updates that a token is behind, on average."""
    timeline: list[tuple[str, float, float, int]]
    """(what, from, to, step)"""


class Simulation:
    def __init__(
        self,
        rates: Rates,
        lengths: Lengths,
        *,
        servers: int,
        ahead: int,
        prompts: int,
        rows: int,
        oversample: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.rates, self.ahead, self.prompts, self.rows = rates, ahead, prompts, rows
        self._begins = math.ceil(prompts * oversample)
        self._draw, self._random = lengths, random.Random(seed)
        self._servers = [Server(max(1, rates.slots // rows)) for _ in range(servers)]
        self._queue: deque[Group] = deque()
        self._carried: list[Group] = []
        self._done: list[Group] = []
        self._events: list[tuple[float, int, str, Any]] = []
        self._number = itertools.count()
        self.now, self.trained, self.begun = 0.0, 0, 0
        self._ready: deque[int] = deque()
        self._busy = self._sampling = False
        self._paused_to = 0.0
        self._batches: dict[int, list[Group]] = {}
        self._began: dict[int, float] = {}
        self.timeline: list[tuple[str, float, float, int]] = []

    def run(self, steps: int) -> Outcome:
        ends = []
        while self.trained < steps:
            self._start_what_can(steps)
            self.now, _, what, about = heapq.heappop(self._events)
            if what == "answer":
                server, stamp = about
                if stamp == server.stamp:
                    self._finish_answers(server)
            elif what == "verified":
                self._finish_group(about)
            elif what == "updated":
                self._busy = False
                ends.append(self.now)
                self._pause()
        settled = ends[len(ends) // 4 :]
        updates = [(begin, end) for name, begin, end, _ in self.timeline if name == "update" and begin >= settled[0]]
        span = settled[-1] - settled[0]
        return Outcome(
            span / (len(settled) - 1),
            sum(end - begin for begin, end in updates) / span,
            statistics.fmean(server.busy_s for server in self._servers) / self.now,
            statistics.fmean(self._behind(step) for step in range(1, steps + 1)),
            self.timeline,
        )

    def _start_what_can(self, steps: int) -> None:
        if not self._sampling and self.begun < min(steps, self.trained + 1 + self.ahead):
            self.begun += 1
            self._sampling, self._began[self.begun] = True, self.now
            fresh = [self._fresh() for _ in range(self._begins - len(self._carried) - len(self._done))]
            self._queue.extend(self._carried + fresh)
            self._carried = []
            self._end_if_enough()
        while self._queue and (free := max(self._servers, key=lambda server: server.room)).room:
            self._give(free, self._queue.popleft())
        if self._ready and not self._busy:
            step = self._ready.popleft()
            tokens = sum(sum(group.tokens.values()) for group in self._batches[step])
            end = self.now + self.rates.update + self.rates.token * tokens
            self._busy = True
            self.timeline.append(("update", self.now, end, step))
            self._at(end, "updated", step)

    def _fresh(self) -> Group:
        return Group([self._draw(self._random) for _ in range(self.rows)])

    def _at(self, when: float, what: str, about: Any) -> None:
        heapq.heappush(self._events, (when, next(self._number), what, about))

    def _pause(self) -> None:
        """All servers, for new weights."""
        for server in self._servers:
            self._advance(server)
            for _, _, answer in server.running:
                self._tell(server, answer)
        self.trained += 1
        self._paused_to = self.now + self.rates.sync
        for server in self._servers:
            self._expect(server)

    def _give(self, server: Server, group: Group) -> None:
        self._advance(server)
        server.room -= 1
        # a prompt holds up whoever decodes beside it, and itself
        server.at = max(server.at, self.now, self._paused_to) + self.rates.prompt
        server.busy_s += self.rates.prompt
        group.open = len(group.left)
        for tokens in group.left:
            answer = Answer(group, server.progress + tokens, server.progress)
            heapq.heappush(server.running, (answer.end, next(self._number), answer))
        self._expect(server)

    def _advance(self, server: Server) -> None:
        """What it has decoded by now."""
        begin = max(server.at, min(self._paused_to, self.now))
        if self.now > begin and server.running:
            server.progress += (self.now - begin) / self._step_s(server)
            server.busy_s += self.now - begin
        server.at = max(server.at, self.now)

    def _tell(self, server: Server, answer: Answer) -> None:
        reached = min(server.progress, answer.end)
        answer.group.tokens[self.trained] += reached - answer.told
        answer.told = reached

    def _step_s(self, server: Server) -> float:
        return self.rates.decode + self.rates.sequence * len(server.running)

    def _expect(self, server: Server) -> None:
        server.stamp += 1
        if server.running:
            begin = max(server.at, self._paused_to)
            left = max(0.0, server.running[0][0] - server.progress)
            self._at(begin + left * self._step_s(server), "answer", (server, server.stamp))

    def _finish_answers(self, server: Server) -> None:
        self._advance(server)
        while server.running and server.running[0][0] <= server.progress + 1e-6:
            _, _, answer = heapq.heappop(server.running)
            self._tell(server, answer)
            answer.group.open -= 1
            if not answer.group.open:
                server.room += 1
                self._at(self.now + self.rates.verify, "verified", answer.group)
        self._expect(server)

    def _finish_group(self, group: Group) -> None:
        self._done.append(group)
        self._end_if_enough()

    def _end_if_enough(self) -> None:
        if not self._sampling or len(self._done) < self.prompts:
            return
        self._cut()
        self._sampling = False
        self._batches[self.begun], self._done = self._done[: self.prompts], self._done[self.prompts :]
        self._ready.append(self.begun)
        self.timeline.append(("sampling", self._began[self.begun], self.now, self.begun))

    def _cut(self) -> None:
        """End what is being sampled; it is carried on with."""
        for server in self._servers:
            self._advance(server)
            left: dict[int, tuple[Group, list[float]]] = {}
            for _, _, answer in server.running:
                self._tell(server, answer)
                left.setdefault(id(answer.group), (answer.group, []))[1].append(answer.end - server.progress)
            for group, tokens in left.values():
                group.left = tokens
                self._carried.append(group)
                server.room += 1
            server.running.clear()
            self._expect(server)
        self._carried += self._queue
        self._queue.clear()

    def _behind(self, step: int) -> float:
        """Updates between the weights that sampled a token and those that are trained: `step` - 1."""
        found: defaultdict[int, float] = defaultdict(float)
        for group in self._batches[step]:
            for version, tokens in group.tokens.items():
                found[version] += tokens
        return sum(tokens * (step - 1 - version) for version, tokens in found.items()) / max(1.0, sum(found.values()))
