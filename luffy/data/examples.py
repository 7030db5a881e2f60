"""Tokenise problems once, and say what was left out.

A prompt over its limit removes the problem. A trace over its limit is dropped and the problem stays, on-policy only:
a truncated trace would teach a solution without an end. Nothing is ever truncated. A problem without an answer goes
too: nothing could be graded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from luffy.data.problem import DataError, Logps, Problem
from luffy.data.think import think_fault
from luffy.wording import counted

if TYPE_CHECKING:
    from luffy.prompts import PromptTemplate


TRACE_FAULTS = {
    "traces_too_long": "too long",
    "traces_broken": "with an EOS inside",
    "traces_unclosed": "with a think tag that is never closed",
    "traces_repeated": "with a think tag twice",
    "traces_outside": "with tokens outside the model's vocabulary",
}
"""Why a trace cannot be learnt from, by its count in `FilterReport`."""


@dataclass(frozen=True, slots=True)
class Example:
    """A problem as token ids; every trace ends in the EOS.

    teachers: who wrote each trace, "" where nobody says. trace_logps: log-probs of each one's tokens under its teacher,
    nats; () where they are not known.
    """

    problem: Problem
    prompt_ids: tuple[int, ...]
    traces: tuple[tuple[int, ...], ...]
    teachers: tuple[str, ...] = ()
    trace_logps: tuple[Logps, ...] = ()

    def __post_init__(self) -> None:
        for name, nothing in (("teachers", ""), ("trace_logps", ())):
            if not getattr(self, name):
                object.__setattr__(self, name, (nothing,) * len(self.traces))


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterReport:
    """Counts of one `tokenize` call.

    problems: given. kept: examples returned. prompts_too_long: problems removed, `longest_prompt_id` among them.
    no_answer, prompts_outside: problems removed for want of an answer, or for tokens outside the model's vocabulary.
    no_trace: problems that came without a trace. traces: traces of problems whose prompt fits.
    traces_...: of those, dropped for what `TRACE_FAULTS` says. first_faults: the first problem's id for each count.
    on_policy_only: examples left with no trace, for whichever reason.
    """

    problems: int = 0
    kept: int = 0
    prompts_too_long: int = 0
    longest_prompt_id: str = ""
    no_answer: int = 0
    prompts_outside: int = 0
    no_trace: int = 0
    traces: int = 0
    traces_too_long: int = 0
    traces_broken: int = 0
    traces_unclosed: int = 0
    traces_repeated: int = 0
    traces_outside: int = 0
    on_policy_only: int = 0
    first_faults: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        longest = f" (e.g. {self.longest_prompt_id})" if self.longest_prompt_id else ""
        used = self.traces - sum(getattr(self, fault) for fault in TRACE_FAULTS)
        more = {"no_answer": "without an answer", "prompts_outside": "with tokens outside the model's vocabulary"}
        longest += "".join(self._said(name, words) for name, words in more.items())
        traces = "".join(self._said(name, TRACE_FAULTS[name]) for name in list(TRACE_FAULTS)[2:])
        return (
            f"kept {self.kept:,} of {counted(self.problems, 'problem')}: "
            f"{counted(self.prompts_too_long, 'prompt')} too long{longest}; kept {used:,} of "
            f"{counted(self.traces, 'trace')}: {self.traces_too_long:,} too long, {self.traces_broken:,} with an EOS "
            f"inside{traces}; {counted(self.no_trace, 'problem')} came without a trace, "
            f"{self.on_policy_only:,} on-policy only"
        )

    def _said(self, name: str, words: str) -> str:
        """Only where there are any: most data have none of these."""
        count = getattr(self, name)
        return f", {count} {words} (e.g. {self.first_faults.get(name, '')})" if count else ""


def encode_trace(text: str, template: "PromptTemplate", max_trace_tokens: int) -> tuple[tuple[int, ...], str]:
    """Ids of a trace with its EOS, () where it has none, and what is wrong with it: a key of `TRACE_FAULTS`, or ""."""
    fault = think_fault(text, opened=template.opens_think)
    try:
        ids = tuple(template.encode_trace(text))
    except ValueError:
        return (), "traces_broken"
    if fault:
        return ids, f"traces_{fault}"
    if not within(ids, template.vocab_size):
        return ids, "traces_outside"
    return ids, "traces_too_long" if len(ids) > max_trace_tokens else ""


def within(ids: Sequence[int], vocab_size: int | None) -> bool:
    """Whether all ids are in a vocabulary; None: nobody has said how large it is."""
    return vocab_size is None or max(ids, default=0) < vocab_size


def tokenize(
    problems: Sequence[Problem], template: "PromptTemplate", *, max_prompt_tokens: int, max_trace_tokens: int
) -> tuple[list[Example], FilterReport]:
    """Examples of the problems that fit, in order, and the report.

    max_prompt_tokens, max_trace_tokens: inclusive limits in tokens; a trace's EOS counts.
    Raises DataError when no example is left, with what removed how many, and where traces have other teacher log-probs
    than tokens, with how many.
    """
    examples: list[Example] = []
    longest, longest_id = 0, ""
    counts = dict.fromkeys(("prompts_too_long", "no_answer", "prompts_outside", "no_trace", "traces", *TRACE_FAULTS), 0)
    first: dict[str, str] = {}
    unequal: list[str] = []

    def drop(reason: str) -> None:
        counts[reason] += 1
        first.setdefault(reason, problem.id)

    for problem in problems:
        if not problem.answer:
            drop("no_answer")
            continue
        prompt_ids = tuple(template.encode_prompt(problem.messages))
        if len(prompt_ids) > max_prompt_tokens:
            drop("prompts_too_long")
            if len(prompt_ids) > longest:
                longest, longest_id = len(prompt_ids), problem.id
            continue
        if not within(prompt_ids, template.vocab_size):
            drop("prompts_outside")
            continue
        kept: list[tuple[tuple[int, ...], str, Logps]] = []
        counts["no_trace"] += not problem.traces
        for at, text in enumerate(problem.traces):
            counts["traces"] += 1
            trace, fault = encode_trace(text, template, max_trace_tokens)
            logps = problem.trace_logps[at] if problem.trace_logps else ()
            if fault:
                drop(fault)
            elif logps and len(logps) != len(trace):
                unequal.append(f"{problem.id}: trace {at + 1} has {len(logps)} and {len(trace)} tokens, EOS included")
            else:
                kept.append((trace, problem.teachers[at] if problem.teachers else "", logps))
        traces, teachers, known = zip(*kept, strict=True) if kept else ((), (), ())
        examples.append(Example(problem, prompt_ids, traces, teachers, known))
    if unequal:
        raise DataError(
            f"{len(unequal)} of {counts['traces']} traces have other teacher log-probs than tokens ({unequal[0]}); "
            f"score them with this model's tokenizer and prompt style (luffy data score)"
        )
    report = FilterReport(
        problems=len(problems),
        kept=len(examples),
        longest_prompt_id=longest_id,
        on_policy_only=sum(not example.traces for example in examples),
        first_faults=first,
        **counts,
    )
    if not examples:
        raise DataError(
            f"no example is left with max_prompt_tokens={max_prompt_tokens}: {report}; raise that limit if it is too "
            f"low, or mend the data"
        )
    return examples, report
