"""The filters of a training set, in order: rows of the source in, rows of the training set out, each loss counted.

Published (LUFFY, arXiv 2504.14945 and its preparation script, as a survey states them; not checked against the authors'
code): generations marked right and complete, of at most 8192 tokens as a whole, and of those the first. Ours besides:
no answer, empty texts, faults of the think tags, equal generations, equal questions.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luffy.data.load import convert
from luffy.data.problem import DataError, Problem
from luffy.data.readers.openr1 import RIGHT, Generation, generations
from luffy.data.rows import SourceRow
from luffy.data.think import think_fault
from luffy.prepare.options import Options
from luffy.prepare.tally import Tally
from luffy.prompts import LUFFY_SYSTEM
from luffy.rewards.golds import Answer

Turns = Sequence[Mapping[str, str]]


@dataclass
class Candidate:
    """position: in the source. left: generations that are still in."""

    position: int
    problem: Problem
    prompt: Turns
    left: list[Generation]

    def drop(self, stays: Sequence[bool], step: str, tally: Tally) -> None:
        for _ in range(len(stays) - sum(stays)):
            tally.drop_generation(step, self.problem.id)
        self.left = [generation for generation, stay in zip(self.left, stays, strict=True) if stay]


@dataclass(kw_only=True)
class Sieve:
    """tokens: counts of texts. accepts: the verifier's word on (text, answer) pairs; None: the source's marks count.
    left_out, seen: questions of the complement, and of what was kept so far, by `question_key`."""

    options: Options
    tokens: Callable[[Sequence[str]], list[int]]
    accepts: Callable[[Sequence[tuple[str, Answer]]], list[bool]] | None = None
    left_out: frozenset[str] = frozenset()
    seen: set[str] = field(default_factory=set)

    def sift(self, rows: Sequence[SourceRow], first: int) -> tuple[list[dict[str, Any]], Tally]:
        """Rows of the training set, and what became of the others.

        first: position in the source of the first of `rows`. Kept questions are added to `seen`.
        """
        tally = Tally()
        waiting = self._fitting(self._verifiable(rows, first, tally), tally)
        for one in waiting:
            one.left = self._well_formed(one, tally)
        lengths = iter(self.tokens([generation.text for one in waiting for generation in one.left]))
        for one in waiting:
            one.drop([next(lengths) <= self.options.max_tokens for _ in one.left], "too_long", tally)
        if self.accepts is not None:
            accepted = iter(self.accepts([(trace.text, one.problem.answer) for one in waiting for trace in one.left]))
            for one in waiting:
                one.drop([next(accepted) for _ in one.left], "rejected", tally)
        return [training_row(one, self.options) for one in waiting if self._keep(one, tally)], tally

    def _verifiable(self, rows: Sequence[SourceRow], first: int, tally: Tally) -> list[Candidate]:
        found = []
        for position, (row, schema, problem) in enumerate(convert(rows), first):
            tally.problems["read"] += 1
            if any(problem.trace_logps) and self.options.traces:
                raise DataError(
                    f"{row.where}: has the teachers' log-probs of its traces, which depend on the prompt and would be "
                    "lost; prepare first, then score what was prepared (luffy data score)"
                )
            if not problem.answer:
                tally.drop_problem("without_answer", problem.id)
            elif question_key(problem.messages) in self.left_out:
                tally.drop_problem("in_complement", problem.id)
            else:
                raw = schema.name == "openr1" and bool(self.options.traces)
                texts = self._marked(row) if raw else _traces(problem)
                wanted = texts if self.options.traces else []
                found.append(Candidate(position, problem, prompt(problem, self.options), wanted))
        return found

    def _marked(self, row: SourceRow) -> list[Generation]:
        if RIGHT not in row.values and self.accepts is None:
            raise DataError(
                f"{row.where}: column {RIGHT!r} is missing, so nothing says which generations are right; have them "
                "graded with --verify"
            )
        return generations(row.values, row.where)

    def _fitting(self, waiting: list[Candidate], tally: Tally) -> list[Candidate]:
        limit = self.options.max_prompt_tokens
        if limit is None:
            return waiting
        lengths = self.tokens(["\n".join(turn["content"] for turn in one.prompt) for one in waiting])
        for one, length in zip(waiting, lengths, strict=True):
            if length > limit:
                tally.drop_problem("prompt_too_long", one.problem.id)
        return [one for one, length in zip(waiting, lengths, strict=True) if length <= limit]

    def _well_formed(self, one: Candidate, tally: Tally) -> list[Generation]:
        found: dict[str, Generation] = {}
        for generation in one.left:
            tally.generations["read"] += 1
            step = self._fault(generation) or ("repeated" if generation.text in found else "")
            if step:
                tally.drop_generation(step, one.problem.id)
            else:
                found[generation.text] = generation
        return list(found.values())

    def _fault(self, generation: Generation) -> str:
        if not generation.text.strip():
            return "empty"
        if not generation.right and self.accepts is None:
            return "marked_wrong"
        if not generation.complete:
            return "incomplete"
        fault = think_fault(generation.text)
        return f"think_{fault}" if fault else ""

    def _keep(self, one: Candidate, tally: Tally) -> bool:
        wanted, key = self.options.traces, question_key(one.problem.messages)
        if wanted and not one.left:
            tally.drop_problem("without_trace", one.problem.id)
            return False
        if key in self.seen:
            tally.drop_problem("repeated_question", one.problem.id)
            one.drop([False] * len(one.left), "of_repeated_question", tally)
            return False
        one.drop([at < wanted for at in range(len(one.left))], "not_wanted", tally)
        self.seen.add(key)
        tally.problems["kept"] += 1
        tally.generations["kept"] += len(one.left)
        tally.several_answers += not isinstance(one.problem.answer, str)
        return True


def _traces(problem: Problem) -> list[Generation]:
    teachers = problem.teachers or ("",) * len(problem.traces)
    return [Generation(text, teacher=who) for text, who in zip(problem.traces, teachers, strict=True)]


def question_key(messages: Turns) -> str:
    """Equal for equal questions, whatever their spaces and system turn."""
    question = "\n".join(turn["content"] for turn in messages if turn["role"] != "system")
    return hashlib.blake2b(" ".join(question.split()).encode(), digest_size=16).hexdigest()


def prompt(problem: Problem, options: Options) -> Turns:
    """The problem's turns, LUFFY's system turn first where they have none."""
    turns = [dict(turn) for turn in problem.messages]
    if options.system and all(turn["role"] != "system" for turn in turns):
        turns.insert(0, {"role": "system", "content": LUFFY_SYSTEM})
    return turns


def training_row(one: Candidate, options: Options) -> dict[str, Any]:
    """In LUFFY's columns; `write.schema` has their types."""
    problem = one.problem
    more: dict[str, Any] = {}
    if options.traces:
        more["target"] = [{"role": "assistant", "content": one.left[0].text}]
        teachers = [trace.teacher for trace in one.left]
        more["target_teachers"] = teachers if any(teachers) else None
    if options.traces > 1:
        more["target_lst"] = [trace.text for trace in one.left[1:]]
    return {
        "data_source": problem.data_source,
        "prompt": list(one.prompt),
        "ability": "math",
        "reward_model": {"ground_truth": problem.answer, "style": "rule"},
        "extra_info": {
            "index": one.position,
            "split": "default",
            "id": problem.id,
            "source": str(problem.extra.get("source", "")),
        },
    } | more
