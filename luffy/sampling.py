"""A step's groups: prompts drawn from the stream, sampled, graded while others are still being sampled.

`rollout.oversample` begins more prompts than a step needs and ends sampling when enough are done; what has been sampled
of the others is carried on with in the next step. `rollout.refill` draws further prompts for those whose rows all have
the same reward: their gradient is zero. Every rank does so for its share of the step and asks nobody; what all have
taken is told when the groups are gathered, and goes into the ledger (`luffy.data.batches`). An objective that remembers
answers chooses some of a step's groups (`luffy.recall`), and may pass over prompts that it is done with. Rollouts may
begin with a part of a trace: some of them, or others in place of a group's that are all wrong.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, TypeVar

from luffy import optim
from luffy.data import Example
from luffy.data.batches import Ledger
from luffy.dtypes import dtype_of
from luffy.groups import Group, Row
from luffy.objectives.choice import Known
from luffy.recall import recall
from luffy.rollout.ahead import Ahead
from luffy.rollout.engine import Completion, Ids, Request
from luffy.seeds import derive
from luffy.setup import Trainer
from luffy.timing import Phases

T = TypeVar("T")
Phase = Callable[[str], AbstractContextManager[None]]
COUNTED = ("batch/refills", "batch/groups_given_up", "batch/tried_again", "rollout/answers_cut")
POLL_S = 0.2
"""How often what has been graded is looked at while sampling goes on."""


@dataclass(slots=True, kw_only=True)
class Batch:
    """What one rank has for a step."""

    groups: list[Group]
    given_up: list[int]
    """Positions of prompts that were sampled and had no signal, or were passed over."""
    counts: Counter[str]


@dataclass(slots=True, kw_only=True)
class Work:
    """A prompt and what there is of its answers."""

    index: int
    """Of its example in the training data."""
    position: int = -1
    """In the stream; -1: an answer was recalled."""
    example: Example
    seed: tuple[Any, ...]
    """What its requests' seeds are derived from, and nobody else's."""
    traces: list[int] = field(default_factory=list)
    """Numbers of those of its example that join the group."""
    hinted: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """Log-probs of their tokens by the engine, given the objective's hint; by those numbers."""
    recalled: Row | None = None
    """A stored answer that does."""
    count: int
    """Rollouts without a prefix."""
    prefixes: list[Ids] = field(default_factory=list)
    """Of a trace, that as many rollouts begin with."""
    answers: list[Completion] = field(default_factory=list)
    """Those with a prefix, then the others."""
    open: int = 0
    """Requests that are not answered."""

    def __post_init__(self) -> None:
        self.answers = [Completion(ids, (math.nan,) * len(ids), finished=False) for ids in self.prefixes]


def done(group: Group) -> Future[Group]:
    future: Future[Group] = Future()
    future.set_result(group)
    return future


def sync(t: Trainer) -> None:
    """Give the engine the policy's weights, if it is about to be asked and has older ones."""
    if t.engine.version != t.version:
        t.engine.sync(t.policy, dtype_of(t.config.rollout.dtype or t.config.model.dtype), t.version)


@contextmanager
def awake(t: Trainer) -> Iterator[None]:
    """The engine at work; with `rollout.sleep` it has the memory of the optimizers' moments meanwhile."""
    with ExitStack() as parked:
        for optimizer in t.optimizers if t.config.rollout.sleep else ():
            parked.enter_context(optim.parked(optimizer))
        parked.enter_context(t.engine.awake())
        yield


class Sampler:
    """One rank's. before: called when the engine is about to be asked."""

    def __init__(self, t: Trainer, ledger: Ledger, before: Callable[[], None] = lambda: None) -> None:
        self.t, self._before, self._stream = t, before, ledger.stream
        self._fresh = ledger.unused(t.world.rank, t.world.size)
        self._carried: list[Work] = []
        self._ready: list[Group] = []  # graded, and more than the step needed
        self._skipped: list[int] = []
        self._progress = 0.0  # share of the run's steps that are over when the step is that is being sampled
        self._grader = ThreadPoolExecutor(1, thread_name_prefix="grade")
        self._needs = len(t.world.share(list(range(t.config.train.prompts_per_step))))
        least = min((len(t.objective.may_choose(example)) for example in t.examples), default=0)
        self._samples = t.objective.rollouts(min(least, t.objective.options.shown)) > 0

    def batch(self, step: int, phases: Phase) -> Batch:
        """This rank's groups of the next step, in the order of their prompts. With `before` collective: ranks enter it
        whether they need to sample or not."""
        counts = Counter(dict.fromkeys(COUNTED, 0))
        self._progress = (step - 1) / self.t.config.train.steps
        ready, self._ready = self._ready, []
        found = [done(group) for group in ready]
        recalled: list[Work] = []
        if self.t.objective.recalls:
            with phases("recall"):
                recalled = self._recalled(step)
        with phases("sync"):
            if self._samples:
                self._before()
        with phases("rollout"), awake(self.t) if self._samples else nullcontext():
            for number in range(1 + self.t.config.rollout.refill):
                missing = self._needs - self._with_signal(found)
                if missing <= 0:
                    break
                counts["batch/refills"] += number > 0
                found += self._sample(missing, counts, [] if number else recalled)
                if self.t.config.rollout.refill:
                    wait(found)  # what is missing is known by their verdicts
            for number in range(self.t.objective.tries):
                found = self._try_again(found, number, counts)
        with phases("verify"):
            groups = [future.result() for future in found]
        wanted = [group for group in groups if self._is_wanted(group)]
        dull = [group for group in groups if not self._is_wanted(group)]
        kept, self._ready = wanted[: self._needs], wanted[self._needs :]
        kept += [dull.pop() for _ in range(self._needs - len(kept))]  # the last ones: there will be no other
        counts["batch/groups_given_up"] = len(dull)
        skipped, self._skipped = self._skipped, []
        return Batch(
            groups=_in_order(kept),
            given_up=[group.position for group in dull] + skipped,
            counts=counts,
        )

    def __enter__(self) -> "Sampler":
        return self

    def __exit__(self, *_: object) -> None:
        self._grader.shutdown(wait=False, cancel_futures=True)

    def _is_wanted(self, group: Group) -> bool:
        return not self.t.config.rollout.refill or len({row.reward for row in group.rows}) > 1

    def _sample(self, wanted: int, counts: Counter[str], recalled: list[Work]) -> list[Future[Group]]:
        """Groups being graded: as soon as `wanted` of them have a signal, or else all that were drawn for this many,
        those of `recalled` answers among them."""
        works = recalled + self._draw(math.ceil((wanted - len(recalled)) * self.t.config.rollout.oversample))
        return self._answer(works, wanted, counts)

    def _try_again(self, found: list[Future[Group]], number: int, counts: Counter[str]) -> list[Future[Group]]:
        """The groups, and in place of those that the objective wants tried again, from where a trace has come to,
        others."""
        groups = [future.result() for future in found]
        works = [self._more_of(group, number) for group in groups]
        again = [work for work in works if work is not None]
        counts["batch/tried_again"] += len(again)
        # of the colocated engines that share a model each must enter, even with nothing to ask
        stay = [done(group) for group, work in zip(groups, works, strict=True) if work is None]
        return stay + self._answer(again, len(again), counts)

    def _more_of(self, group: Group, number: int) -> Work | None:
        prefixes = self._prefixes(group.example, self.t.objective.again(group, number))
        if not prefixes:
            return None
        return Work(
            index=group.index,
            position=group.position,
            example=group.example,
            seed=(self.t.config.train.seed, "again", group.position, number),
            count=0,
            prefixes=prefixes,
        )

    def _prefixes(self, example: Example, wanted: list[tuple[int, int]]) -> list[Ids]:
        """A rollout must have a token to sample: a prefix leaves one of its trace, and of the longest answer."""
        most = self.t.config.rollout.max_tokens - 1
        found = [example.traces[at][: min(tokens, len(example.traces[at]) - 1, most)] for at, tokens in wanted]
        return [ids for ids in found if ids]

    def _answer(self, works: list[Work], wanted: int, counts: Counter[str]) -> list[Future[Group]]:
        """Groups being graded, at most those of the works: as soon as `wanted` of them have a signal."""
        asked = [(work, request) for work in works for request in self._requests(work)]
        graded = [self._grader.submit(self._grade, work) for work in works if not work.open]
        generation = self.t.engine.begin([request for _, (_, request) in asked], self.t.config.rollout.temperature)
        try:
            while generation.waiting and self._with_signal(graded) < wanted:
                for index, found in generation.take(POLL_S):
                    work, (slot, _) = asked[index]
                    self._put(work, slot, found)
                    if not work.open:
                        graded.append(self._grader.submit(self._grade, work))
        finally:
            left = generation.stop() if generation.waiting else {}
        for index, found in left.items():
            work, (slot, _) = asked[index]
            if len(found) < (work.count if slot < 0 else 1):
                continue  # not all of it was begun: it begins again
            self._put(work, slot, found)
            if not work.open:
                graded.append(self._grader.submit(self._grade, work))
        self._carried += (cut := [work for work in works if work.open])
        counts["rollout/answers_cut"] += sum(self._is_open(answer) for work in cut for answer in work.answers)
        return graded

    def _with_signal(self, graded: list[Future[Group]]) -> int:
        return sum(future.done() and self._is_wanted(future.result()) for future in graded)

    def _recalled(self, step: int) -> list[Work]:
        """This rank's part of what the objective recalls. Collective."""
        seed = self.t.config.train.seed
        return [
            Work(
                index=index,
                example=self.t.examples[index],
                seed=(seed, "recall", step, index),
                recalled=row,
                count=self.t.objective.rollouts(self.t.objective.options.shown) - 1,
            )
            for index, row in self.t.world.share(recall(self.t, derive(seed, "recall", step)))
        ]

    def _draw(self, number: int) -> list[Work]:
        """Carried prompts, then fresh ones, those with long traces first: a step ends with its longest answer, which
        should not be the last to begin."""
        works, self._carried = self._carried[:number], self._carried[number:]
        positions = [self._next() for _ in range(number - len(works))]
        examples = [self.t.examples[self._stream.index(position)] for position in positions]
        fresh = []
        for position, example, known in zip(positions, examples, self._known(positions, examples), strict=True):
            traces = self.t.objective.choose(example, known)
            prefixes = self._prefixes(example, self.t.objective.prefixes(example, known))
            fresh.append(
                Work(
                    index=self._stream.index(position),
                    position=position,
                    example=example,
                    seed=(self.t.config.train.seed, "rollout", position),
                    traces=traces,
                    count=self.t.objective.rollouts(len(traces)) - len(prefixes),
                    prefixes=prefixes,
                )
            )
        self._score_hinted(fresh)
        return works + sorted(fresh, key=lambda work: -max(map(len, work.example.traces), default=0))

    def _score_hinted(self, works: list[Work]) -> None:
        """Traces after the question with the objective's hint at its end, where it has one that is not too long."""
        t, asked = self.t, []
        for work in works:
            if work.traces and (hint := t.objective.hint(work.example)):
                *before, last = work.example.problem.messages
                turn = {**last, "content": f"{last['content']}\n\n{hint}"}
                prompt = tuple(t.template.encode_prompt([*before, turn]))
                most = len(work.example.prompt_ids) + t.objective.scored(work.example) - len(prompt)
                asked += [(work, at, prompt) for at in work.traces if len(work.example.traces[at]) <= most]
        sequences = [prompt + work.example.traces[at] for work, at, prompt in asked]
        scored = t.engine.score(sequences) if sequences else []
        for (work, at, prompt), logps in zip(asked, scored, strict=True):
            work.hinted[at] = tuple(logps[len(prompt) - 1 :])

    def _next(self) -> int:
        """The next position of this rank that the objective is not done with."""
        while True:
            position = next(self._fresh)
            if not self.t.objective.skips(self._stream.index(position), self.t.config.train.prompts_per_step):
                return position
            self._skipped.append(position)

    def _known(self, positions: list[int], examples: list[Example]) -> list[Known]:
        """What the choice among each problem's traces depends on."""
        t, asked = self.t, self.t.config.objective
        several = [example.traces for example in examples]
        right = _of_each(several, self._right(examples)) if getattr(asked, "trace_right", False) else None
        chosen = getattr(asked, "trace_choice", "first")
        logp = _of_each(several, self._logp(examples)) if chosen in ("likely", "unlikely") else None
        return [
            Known(
                seed=derive(t.config.train.seed, "traces", position),
                progress=self._progress,
                right=None if right is None else right[at],
                logp=None if logp is None else logp[at],
            )
            for at, position in enumerate(positions)
        ]

    def _right(self, examples: list[Example]) -> list[bool]:
        decode = self.t.template.decode
        pairs = [(decode(trace), example.problem.answer) for example in examples for trace in example.traces]
        return [verdict.reward >= 1 for verdict in self.t.verifier.grade(pairs)]

    def _logp(self, examples: list[Example]) -> list[float]:
        """Mean log-prob of a token of each trace, by the engine's weights."""
        sequences = [example.prompt_ids + trace for example in examples for trace in example.traces]
        sizes = [len(trace) for example in examples for trace in example.traces]
        scored = self.t.engine.score(sequences) if sequences else []
        return [fmean(logps[-size:]) for logps, size in zip(scored, sizes, strict=True)]

    def _behaviour(self, work: Work, at: int) -> tuple[float, ...]:
        """Log-probs of a trace's tokens that the objective compares with: given its hint, or the teacher's."""
        if self.t.objective.hint(work.example) is not None:
            return work.hinted.get(at, ())
        return work.example.trace_logps[at] if self.t.objective.options.compares else ()

    def _requests(self, work: Work) -> list[tuple[int, Request]]:
        """(which answer, or -1 for all, request) of what is left to sample."""
        most, prompt = self.t.config.rollout.max_tokens, work.example.prompt_ids
        found = []
        if work.count and len(work.answers) == len(work.prefixes):
            found = [(-1, Request(prompt, work.count, most, derive(*work.seed)))]
        for slot, answer in enumerate(work.answers):
            if self._is_open(answer):
                begun = len(answer.token_ids)
                more = Request(prompt + answer.token_ids, 1, most - begun, derive(*work.seed, slot, begun))
                found.append((slot, more))
        work.open = len(found)
        return found

    def _put(self, work: Work, slot: int, found: list[Completion]) -> None:
        """Answers of a request, whole or cut off; none of them: the engine refuses it."""
        if slot < 0:
            work.answers += found
        elif found:
            work.answers[slot] = work.answers[slot].then(found[0])
        mine = found if slot < 0 else work.answers[slot : slot + 1]
        work.open -= not (found and any(map(self._is_open, mine)))

    def _is_open(self, answer: Completion) -> bool:
        return not answer.finished and len(answer.token_ids) < self.t.config.rollout.max_tokens

    def _grade(self, work: Work) -> Group:
        """Fresh rollouts plus stored traces, verified alike: a trace is never assumed right. Nothing is generated after
        a trace."""
        decode = self.t.template.decode
        given = [len(ids) for ids in work.prefixes] + [0] * work.count
        rows = [
            Row(
                token_ids=answer.token_ids,
                text=decode(answer.token_ids),
                finished=answer.finished,
                sampler_logp=answer.logp,
                versions=answer.versions,
                prefix=prefix,
            )
            for answer, prefix in zip(work.answers, given, strict=False)
            if len(answer.token_ids) > prefix  # else the engine refused it
        ]
        for at in work.traces:
            trace, teacher = work.example.traces[at], work.example.teachers[at]
            logps = self._behaviour(work, at)
            rows.append(Row(token_ids=trace, text=decode(trace), is_trace=True, teacher=teacher, behaviour=logps))
        if work.recalled is not None:
            rows.append(work.recalled)
        verdicts = self.t.verifier.grade([(row.text, work.example.problem.answer) for row in rows])
        for row, verdict in zip(rows, verdicts, strict=True):
            row.reward, row.verdict = verdict.reward, verdict.status
        return Group(example=work.example, rows=rows, position=work.position, index=work.index)


def _in_order(groups: list[Group]) -> list[Group]:
    """By position; those that were recalled evenly among them, so that every update of a step has its part."""
    parts: tuple[list[Group], list[Group]] = [], []
    for group in sorted(groups, key=lambda group: (group.position, group.index)):
        parts[group.position < 0].append(group)
    placed = [((n + 0.5) / len(part), group) for part in parts for n, group in enumerate(part)]
    return [group for _, group in sorted(placed, key=lambda item: item[0])]


def _of_each(several: list[tuple[Ids, ...]], values: list[T]) -> list[list[T]]:
    """Values of all traces, one after the other -> those of each problem."""
    rest = iter(values)
    return [[next(rest) for _ in traces] for traces in several]


@contextmanager
def sampling(t: Trainer, ledger: Ledger, first: int) -> Iterator[Callable[[int, Phases], Batch]]:
    """Yields what gives a step, from `first` on, this rank's batch: sampled then and there, or with
    `rollout.max_staleness` ahead of the update. What was sampled ahead and not trained on stays out of the ledger, so
    that a resumed run samples it again."""
    depth = t.config.rollout.max_staleness
    if not depth:
        with Sampler(t, ledger, before=lambda: sync(t)) as sampler:
            yield sampler.batch
        return
    sync(t)  # a resumed run may have an engine that it must not begin with

    def sample(step: int) -> Batch:
        return sampler.batch(step, lambda name: nullcontext())

    with Sampler(t, ledger) as sampler, Ahead(sample, first, t.config.train.steps, depth) as ahead:

        def later(step: int, phases: Phases) -> Batch:
            with phases("rollout"):
                made = ahead.next()
            assert made.step == step
            phases.aside("ahead", made.began, made.seconds)
            phases.idle = {"trainer/idle_s": phases.by_name["rollout"], "rollout/idle_s": made.waited}
            return made.value

        try:
            yield later
        finally:
            ahead.close(t.engine.abort)
