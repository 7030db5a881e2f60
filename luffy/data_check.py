"""`luffy data check`: what a file of problems holds, before a run is spent on it.

Reads it as training would, then says how long prompts and traces are, how three problems look as the model sees them,
what training would leave out, whether the verifier agrees with the traces, and which problems are also among those that
a run is judged by: the same question, less spaces and case, or one that shares so many words in a row.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luffy.data import Problem
from luffy.data.examples import TRACE_FAULTS, encode_trace, within
from luffy.data.think import CLOSE
from luffy.rewards.graders import SYMBOLIC
from luffy.rewards.latex import last_boxed
from luffy.wording import counted

if TYPE_CHECKING:
    from luffy.prompts import PromptTemplate
    from luffy.rewards import VerifierPool

SHOWN = 3
NAMED = 5
"""Examples of what is wrong that are named."""
WIDTH = 40
COMMON, COMMON_SHARE = 10, 0.05
"""Problems, and share of them, above which words in a row that they have in common are their template's."""
_WORD, _PART = re.compile(r"\w+"), re.compile(r"\d+[.,]\d+|\w+|[^\w\s.,;:?]")


@dataclass(kw_only=True)
class Checked:
    """Counts are of problems or traces; a finding that is wrong is in `wrong` as a sentence."""

    problems: int
    without_trace: int = 0
    without_answer: int = 0
    traces: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    prompt_lengths: list[int] = field(default_factory=list)
    trace_lengths: list[int] = field(default_factory=list)
    verdicts: Counter[str] = field(default_factory=Counter)
    overlaps: dict[str, list[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        lengths = {"prompt_tokens": self.prompt_lengths, "trace_tokens": self.trace_lengths}
        spread = {name: [min(x), sorted(x)[len(x) // 2], max(x)] for name, x in lengths.items() if x}
        found: dict[str, Any] = {"problems": self.problems, "without_trace": self.without_trace, "traces": self.traces}
        counts = {"without_answer": self.without_answer, "left_out": dict(self.left_out)}
        return (
            found | counts | spread | {"verdicts": dict(self.verdicts), "overlaps": self.overlaps, "wrong": self.wrong}
        )


def check(
    problems: Sequence[Problem],
    template: PromptTemplate,
    verifier: VerifierPool | None,
    against: Mapping[str, Sequence[Problem]],
    *,
    words: int = 13,
    max_prompt_tokens: int = 1024,
    max_trace_tokens: int = 8192,
) -> Checked:
    """
    Args:
        verifier: grades every trace; None: none is graded.
        against: problems that a run is judged by, by the name of their source.
        words: in a row that two questions share to be called alike (13: as GPT-3 was cleaned, arXiv 2005.14165).
        max_prompt_tokens, max_trace_tokens: as `tokenize` takes them.
    """
    found = Checked(problems=len(problems), without_trace=sum(not problem.traces for problem in problems))
    encode(found, problems, template, max_prompt_tokens, max_trace_tokens)
    if verifier is not None:
        grade(found, problems, verifier)
    for name, others in against.items():
        overlap(found, problems, name, others, words)
    repeated = [key for key, count in Counter(map(plain, problems)).items() if count > 1]
    if repeated:
        ids = [problem.id for problem in problems if plain(problem) in set(repeated[:NAMED])]
        found.wrong.append(f"{counted(len(repeated), 'question', _IS)} there more than once, {named(ids)}")
    return found


_HAS, _IS, _CANNOT = ("has", "have"), ("is", "are"), ("cannot", "cannot")
FAULTS = {
    "without_answer": ("problem", _HAS, "no verifiable answer"),
    "prompts_too_long": ("prompt", _IS, "too long"),
    "prompts_outside": ("prompt", _HAS, "tokens outside the model's vocabulary"),
    **{fault: ("trace", _CANNOT, f"be learnt from: {words}") for fault, words in TRACE_FAULTS.items()},
    "logps": ("trace", _HAS, "other teacher log-probs than tokens"),
    "traces_open": ("trace", ("never closes", "never close"), "the think tag that the prompt opens"),
}
"""(what, verb, what is wrong with it) of each."""


def encode(
    found: Checked, problems: Sequence[Problem], template: PromptTemplate, max_prompt: int, max_trace: int
) -> None:
    """Lengths in tokens, and what training would leave out because of what it is as tokens."""
    faults: dict[str, list[str]] = {name: [] for name in FAULTS}
    for problem in problems:
        prompt_ids = template.encode_prompt(problem.messages)
        found.prompt_lengths.append(len(prompt_ids))
        for name, wrong in (
            ("without_answer", not problem.answer),
            ("prompts_too_long", len(prompt_ids) > max_prompt),
            ("prompts_outside", not within(prompt_ids, template.vocab_size)),
        ):
            if wrong:
                faults[name].append(problem.id)
        for text, logps in zip(problem.traces, problem.trace_logps or [()] * len(problem.traces), strict=True):
            found.traces += 1
            trace, fault = encode_trace(text, template, max_trace)
            if trace:
                found.trace_lengths.append(len(trace))
            if logps and len(logps) != len(trace):
                faults["logps"].append(problem.id)
            if not fault and template.opens_think and CLOSE not in text:
                fault = "traces_open"
            if fault:
                faults[fault].append(problem.id)
    found.without_answer = len(faults["without_answer"])
    for name, ids in faults.items():
        if ids:
            found.left_out[name] = len(ids)
            what, verb, wrong_with = FAULTS[name]
            found.wrong.append(f"{counted(len(ids), what, verb)} {wrong_with}, {named(ids)}")


def grade(found: Checked, problems: Sequence[Problem], verifier: VerifierPool) -> None:
    pairs = [(problem.id, text, problem.answer) for problem in problems if problem.answer for text in problem.traces]
    verdicts = verifier.grade([(text, answer) for _, text, answer in pairs])
    said = ["right" if v.reward >= 1 else "wrong" if v.status == "ok" else v.status for v in verdicts]
    if verifier.grader in SYMBOLIC:
        empty = [last_boxed(text) is None for _, text, _ in pairs]
        said = ["no answer" if what == "wrong" and none else what for what, none in zip(said, empty, strict=True)]
    found.verdicts.update(said)
    wrong = [id for (id, _, _), verdict in zip(pairs, said, strict=True) if verdict != "right"]
    without = [id for (id, _, _), verdict in zip(pairs, said, strict=True) if verdict == "no answer"]
    if without:
        traces = counted(len(without), "trace", _HAS)
        found.wrong.append(f"{traces} no \\boxed{{}} nor another verifiable answer, {named(without)}")
    if wrong:
        found.wrong.append(
            f"the verifier does not accept {len(wrong)} of {counted(len(pairs), 'trace')}, {named(wrong)}"
        )


def overlap(found: Checked, problems: Sequence[Problem], name: str, others: Sequence[Problem], words: int) -> None:
    same, theirs = {plain(other) for other in others}, {run for other in others for run in runs_of(other, words)}
    ours = Counter(run for problem in problems for run in theirs.intersection(runs_of(problem, words)))
    # what so many questions share is said by a template, not by any of them
    runs = {run for run, count in ours.items() if count <= max(COMMON, len(problems) * COMMON_SHARE)}
    ids = [p.id for p in problems if plain(p) in same or not runs.isdisjoint(runs_of(p, words))]
    found.overlaps[name] = ids
    if ids:
        found.wrong.append(f"{counted(len(ids), 'problem', _IS)} among those of {name} or much like them, {named(ids)}")


def question(problem: Problem) -> str:
    return "\n".join(turn["content"] for turn in problem.messages if turn["role"] != "system")


def plain(problem: Problem) -> str:
    """Its question, less spaces, case and the stops of sentences; 7+3 and 7-3 are two."""
    return plain_text(question(problem))


def plain_text(text: str) -> str:
    return " ".join(_PART.findall(text.casefold()))


def runs_of(problem: Problem, words: int) -> Iterator[tuple[str, ...]]:
    said = _WORD.findall(question(problem).casefold())
    return (tuple(said[at : at + words]) for at in range(len(said) - words + 1))


def named(ids: Sequence[str]) -> str:
    return f"such as {', '.join(ids[:NAMED])}"


def report(found: Checked, problems: Sequence[Problem], template: PromptTemplate) -> Iterator[str]:
    """Lines for people."""
    yield (
        f"{counted(found.problems, 'problem')}, {counted(found.traces, 'trace')}; "
        f"{counted(found.without_trace, 'problem', _HAS)} none"
    )
    for what, lengths in (("prompts", found.prompt_lengths), ("traces", found.trace_lengths)):
        if lengths:
            yield f"\n{what}, tokens: {min(lengths)} to {max(lengths)}, median {sorted(lengths)[len(lengths) // 2]}"
            yield from histogram(lengths)
    for problem in problems[:SHOWN]:
        yield f"\n{problem.id}, as the model sees it (answer: {problem.answer!r})"
        yield shown(template, template.encode_prompt(problem.messages))
        for text in problem.traces[:1]:
            trace, fault = encode_trace(text, template, sys.maxsize)
            yield f"its trace\n{shown(template, trace) if trace else f'left out: {TRACE_FAULTS[fault]}'}"
    if found.verdicts:
        yield "\ntraces by the verifier: " + ", ".join(f"{n} {what}" for what, n in found.verdicts.most_common())
    for name, ids in found.overlaps.items():
        yield f"also in {name}: {counted(len(ids), 'problem')}"
    yield ""
    yield from (f"! {sentence}" for sentence in found.wrong)
    if not found.wrong:
        yield "nothing wrong was found"


def histogram(lengths: Iterable[int]) -> Iterator[str]:
    """By powers of two."""
    counts = Counter((length - 1).bit_length() for length in lengths)
    most = max(counts.values())
    for power in range(min(counts), max(counts) + 1):
        bar = "#" * -(-WIDTH * counts[power] // most)
        yield f"  <= {2**power:7,}  {counts[power]:8,}  {bar}"


def shown(template: PromptTemplate, ids: Sequence[int]) -> str:
    """Text of these ids, special tokens as they are written, the middle of a long one left out."""
    text = str(template.tokenizer.decode(list(ids), skip_special_tokens=False))
    return text if len(text) <= 900 else f"{text[:600]}\n  [... {len(text) - 850} characters ...]\n{text[-250:]}"
