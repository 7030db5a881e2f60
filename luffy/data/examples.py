"""Tokenise problems once, and say what was left out.

A prompt over its limit removes the problem. A trace over its limit is dropped and the problem stays, on-policy only:
a truncated trace would teach a solution without an end. Nothing is ever truncated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luffy.data.problem import DataError, Problem

if TYPE_CHECKING:
    from luffy.prompts import PromptTemplate


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
    trace_logps: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        for name, nothing in (("teachers", ""), ("trace_logps", ())):
            if not getattr(self, name):
                object.__setattr__(self, name, (nothing,) * len(self.traces))


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterReport:
    """Counts of one `tokenize` call.

    problems: given. kept: examples returned. prompts_too_long: problems removed, `longest_prompt_id` among them.
    no_trace: problems that came without a trace. traces: traces of problems whose prompt fits.
    traces_too_long, traces_broken: of those, dropped for length or for an EOS inside.
    on_policy_only: examples left with no trace, for whichever reason.
    """

    problems: int = 0
    kept: int = 0
    prompts_too_long: int = 0
    longest_prompt_id: str = ""
    no_trace: int = 0
    traces: int = 0
    traces_too_long: int = 0
    traces_broken: int = 0
    on_policy_only: int = 0

    def __str__(self) -> str:
        longest = f" (e.g. {self.longest_prompt_id})" if self.longest_prompt_id else ""
        used = self.traces - self.traces_too_long - self.traces_broken
        return (
            f"kept {self.kept} of {self.problems} problems: {self.prompts_too_long} prompts too long{longest}; "
            f"kept {used} of {self.traces} traces: {self.traces_too_long} too long, {self.traces_broken} with an EOS "
            f"inside; {self.no_trace} problems came without a trace, {self.on_policy_only} are on-policy only"
        )


def tokenize(
    problems: Sequence[Problem], template: "PromptTemplate", *, max_prompt_tokens: int, max_trace_tokens: int
) -> tuple[list[Example], FilterReport]:
    """Examples of the problems that fit, in order, and the report.

    max_prompt_tokens, max_trace_tokens: inclusive limits in tokens; a trace's EOS counts.
    Raises DataError when no example is left, with what removed how many, and where a trace has other teacher log-probs
    than tokens.
    """
    examples: list[Example] = []
    longest, longest_id = 0, ""
    counts = dict.fromkeys(("prompts_too_long", "no_trace", "traces", "traces_too_long", "traces_broken"), 0)
    for problem in problems:
        prompt_ids = tuple(template.encode_prompt(problem.messages))
        if len(prompt_ids) > max_prompt_tokens:
            counts["prompts_too_long"] += 1
            if len(prompt_ids) > longest:
                longest, longest_id = len(prompt_ids), problem.id
            continue
        kept: list[tuple[tuple[int, ...], str, tuple[float, ...]]] = []
        counts["no_trace"] += not problem.traces
        for at, text in enumerate(problem.traces):
            counts["traces"] += 1
            try:
                trace = tuple(template.encode_trace(text))
            except ValueError:
                counts["traces_broken"] += 1
                continue
            logps = problem.trace_logps[at] if problem.trace_logps else ()
            if len(trace) > max_trace_tokens:
                counts["traces_too_long"] += 1
            elif logps and len(logps) != len(trace):
                raise DataError(
                    f"{problem.id}: trace {at + 1} has {len(logps)} teacher log-probs and {len(trace)} tokens, EOS "
                    f"included; score it with this model's tokenizer and prompt style (luffy data score)"
                )
            else:
                kept.append((trace, problem.teachers[at] if problem.teachers else "", logps))
        traces, teachers, known = zip(*kept, strict=True) if kept else ((), (), ())
        examples.append(Example(problem, prompt_ids, traces, teachers, known))
    report = FilterReport(
        problems=len(problems),
        kept=len(examples),
        longest_prompt_id=longest_id,
        on_policy_only=sum(not example.traces for example in examples),
        **counts,
    )
    if not examples:
        raise DataError(f"no example is left with max_prompt_tokens={max_prompt_tokens}: {report}")
    return examples, report
