"""`luffy data check`: what a file of problems holds, before a run is spent on it.

Reads it as training would, then says how long prompts and traces are, how three problems look as the model sees them,
whether the verifier agrees with the traces, and which problems are also among those that a run is judged by: the same
question, less spaces and case, or one that shares so many words in a row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luffy.data import Problem

if TYPE_CHECKING:
    from luffy.prompts import PromptTemplate
    from luffy.rewards import VerifierPool

SHOWN = 3
NAMED = 5
"""Examples of what is wrong that are named."""
WIDTH = 40
_WORD = re.compile(r"\w+")


@dataclass(kw_only=True)
class Checked:
    """Counts are of problems or traces; a finding that is wrong is in `wrong` as a sentence."""

    problems: int
    without_trace: int = 0
    traces: int = 0
    prompt_lengths: list[int] = field(default_factory=list)
    trace_lengths: list[int] = field(default_factory=list)
    verdicts: Counter[str] = field(default_factory=Counter)
    overlaps: dict[str, list[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        lengths = {"prompt_tokens": self.prompt_lengths, "trace_tokens": self.trace_lengths}
        spread = {name: [min(x), sorted(x)[len(x) // 2], max(x)] for name, x in lengths.items() if x}
        found = {"problems": self.problems, "without_trace": self.without_trace, "traces": self.traces}
        return found | spread | {"verdicts": dict(self.verdicts), "overlaps": self.overlaps, "wrong": self.wrong}


def check(
    problems: Sequence[Problem],
    template: PromptTemplate,
    verifier: VerifierPool | None,
    against: Mapping[str, Sequence[Problem]],
    *,
    words: int = 13,
) -> Checked:
    """
    Args:
        verifier: grades every trace; None: none is graded.
        against: problems that a run is judged by, by the name of their source.
        words: in a row that two questions share to be called alike (13: as GPT-3 was cleaned, arXiv 2005.14165).
    """
    found = Checked(problems=len(problems), without_trace=sum(not problem.traces for problem in problems))
    broken = []
    for problem in problems:
        found.prompt_lengths.append(len(template.encode_prompt(problem.messages)))
        for text in problem.traces:
            found.traces += 1
            try:
                found.trace_lengths.append(len(template.encode_trace(text)))
            except ValueError as error:
                broken.append(f"{problem.id} ({error})")
    if broken:
        found.wrong.append(f"{len(broken)} traces cannot be encoded, {named(broken)}")
    if verifier is not None:
        grade(found, problems, verifier)
    for name, others in against.items():
        overlap(found, problems, name, others, words)
    repeated = [key for key, count in Counter(map(plain, problems)).items() if count > 1]
    if repeated:
        ids = [problem.id for problem in problems if plain(problem) in set(repeated[:NAMED])]
        found.wrong.append(f"{len(repeated)} questions are there more than once, {named(ids)}")
    return found


def grade(found: Checked, problems: Sequence[Problem], verifier: VerifierPool) -> None:
    pairs = [(problem.id, text, problem.answer) for problem in problems for text in problem.traces]
    verdicts = verifier.grade([(text, answer) for _, text, answer in pairs])
    said = ["right" if v.reward >= 1 else "wrong" if v.status == "ok" else v.status for v in verdicts]
    found.verdicts.update(said)
    wrong = [id for (id, _, _), verdict in zip(pairs, said, strict=True) if verdict != "right"]
    if wrong:
        found.wrong.append(f"the verifier does not accept {len(wrong)} of {len(pairs)} traces, {named(wrong)}")


def overlap(found: Checked, problems: Sequence[Problem], name: str, others: Sequence[Problem], words: int) -> None:
    same, runs = {plain(other) for other in others}, {run for other in others for run in runs_of(other, words)}
    ids = [p.id for p in problems if plain(p) in same or not runs.isdisjoint(runs_of(p, words))]
    found.overlaps[name] = ids
    if ids:
        found.wrong.append(f"{len(ids)} problems are among those of {name} or much like them, {named(ids)}")


def question(problem: Problem) -> str:
    return "\n".join(turn["content"] for turn in problem.messages if turn["role"] != "system")


def plain(problem: Problem) -> str:
    return " ".join(_WORD.findall(question(problem).casefold()))


def runs_of(problem: Problem, words: int) -> Iterator[tuple[str, ...]]:
    said = _WORD.findall(question(problem).casefold())
    return (tuple(said[at : at + words]) for at in range(len(said) - words + 1))


def named(ids: Sequence[str]) -> str:
    return f"such as {', '.join(ids[:NAMED])}"


def report(found: Checked, problems: Sequence[Problem], template: PromptTemplate) -> Iterator[str]:
    """Lines for people."""
    yield f"{found.problems} problems, {found.traces} traces; {found.without_trace} problems have none"
    for what, lengths in (("prompts", found.prompt_lengths), ("traces", found.trace_lengths)):
        if lengths:
            yield f"\n{what}, tokens: {min(lengths)} to {max(lengths)}, median {sorted(lengths)[len(lengths) // 2]}"
            yield from histogram(lengths)
    for problem in problems[:SHOWN]:
        yield f"\n{problem.id}, as the model sees it (answer: {problem.answer!r})"
        yield shown(template, template.encode_prompt(problem.messages))
        for text in problem.traces[:1]:
            yield f"its trace\n{shown(template, template.encode_trace(text))}"
    if found.verdicts:
        yield "\ntraces by the verifier: " + ", ".join(f"{n} {what}" for what, n in found.verdicts.most_common())
    for name, ids in found.overlaps.items():
        yield f"also in {name}: {len(ids)} problems"
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
