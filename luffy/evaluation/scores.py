"""From answers to numbers: graded, counted, with intervals."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from luffy.evaluation.answers import Answered
from luffy.evaluation.questions import Question
from luffy.evaluation.statistics import difference, interval, majority, pass_at_k
from luffy.rewards import Verdict, VerifierPool, label
from luffy.rewards.graders import THINK_END
from luffy.rewards.latex import normal
from luffy.rewards.strict import LONGEST_ANSWER, box_of
from luffy.rewards.texts import choice_of, final_answer

OWN_THINKING = ("train", "deepscaler", "deepscaler_v0", "deepscaler_v1")
"""Graders that look for the end of thoughts themselves."""


@dataclass(slots=True)
class Graded:
    """A question with its answers and the verdicts on them."""

    question: Question
    answers: list[Answered]
    verdicts: list[Verdict]
    others: dict[str, list[Verdict]] = field(default_factory=dict)
    """By further graders."""
    said: list[str] = field(default_factory=list)
    """What each answer ends up saying, as votes count it; "" for nothing."""

    @property
    def right(self) -> list[bool]:
        """Of each answer; partial credit is none."""
        return [verdict.reward >= 1 for verdict in self.verdicts]

    @property
    def accuracy(self) -> float:
        """Share of its answers that are right."""
        return fmean(self.right)


@dataclass(slots=True, kw_only=True)
class Scores:
    """Of a benchmark. Rates are of answers, everything else of questions."""

    benchmark: str
    grader: str
    questions: int
    answers: int
    accuracy: float
    interval: tuple[float, float]
    pass_at: dict[int, float]
    majority: float | None
    """None where some question has a single answer, or where it is not known what a grader reads."""
    mean_tokens: float
    truncated: float
    no_answer: float | None
    timeouts: int
    crashes: int
    disagree: dict[str, float]
    """Of answers, those on which a further grader says otherwise."""
    by_question: list[float] = field(repr=False)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "by_question"}


def judged_part(text: str, opened: bool) -> str:
    """What a grader of answers is given: what follows the thoughts, nothing where they never end.

    opened: whether the prompt opens them.
    """
    if opened or text.lstrip().startswith("<think>"):
        return text.partition(THINK_END)[2]
    return text


def grade(
    questions: Sequence[Question], answers: Sequence[list[Answered]], pools: Sequence[VerifierPool], opened: bool
) -> list[Graded]:
    """Verdicts of the first pool, and of the others beside them. opened: whether prompts open the thoughts."""
    found = [Graded(question, given, []) for question, given in zip(questions, answers, strict=True)]
    for at, pool in enumerate(pools):
        whole = pool.grader in OWN_THINKING
        given = [(item, a.text if whole else judged_part(a.text, opened)) for item in found for a in item.answers]
        verdicts = pool.grade([(text, item.question.answer) for item, text in given])
        for (item, text), verdict in zip(given, verdicts, strict=True):
            if at == 0:
                item.verdicts.append(verdict)
                item.said.append(said(judged_part(text, opened) if whole else text, pool.grader))
            else:
                item.others.setdefault(pool.grader, []).append(verdict)
    return found


BOXES = ("boxed", "deepscaler", "deepscaler_v0", "deepscaler_v1")
READ = (*BOXES, "choice", "exact")
"""Graders of which it is known what they read."""


def said(text: str, grader: str) -> str:
    """What an answer says, in one spelling; "" where it says nothing that the grader reads, or more than an answer."""
    if grader == "choice":
        return choice_of(text)
    found = (box_of(text) or "") if grader in BOXES else final_answer(text)
    try:
        return normal(found) if len(found) <= LONGEST_ANSWER else ""
    except RecursionError:
        return ""


def scores(benchmark: str, graded: Sequence[Graded], grader: str, ks: Sequence[int] = (), seed: int = 0) -> Scores:
    """Raises ValueError where a k is more than the answers to some question."""
    answers = [answer for item in graded for answer in item.answers]
    verdicts = [verdict for item in graded for verdict in item.verdicts]
    by_question = [item.accuracy for item in graded]
    statuses = Counter(verdict.status for verdict in verdicts)
    several = min(len(item.answers) for item in graded) > 1 and grader in READ
    return Scores(
        benchmark=benchmark,
        grader=label(grader),
        questions=len(graded),
        answers=len(answers),
        accuracy=fmean(by_question),
        interval=interval([by_question], seed=seed),
        pass_at={k: fmean(pass_at_k(sum(item.right), len(item.right), k) for item in graded) for k in ks},
        majority=fmean(voted(item) for item in graded) if several else None,
        mean_tokens=fmean(answer.tokens for answer in answers),
        truncated=fmean(not answer.finished for answer in answers),
        no_answer=fmean(not words for item in graded for words in item.said) if grader in READ else None,
        timeouts=statuses["timeout"],
        crashes=statuses["crash"],
        disagree={name: apart(graded, name) for name in graded[0].others},
        by_question=by_question,
    )


def voted(item: Graded) -> float:
    """maj@n of one question (`statistics.majority`)."""
    pairs = zip(item.said, item.verdicts, strict=True)
    right: dict[Hashable, bool] = {words: verdict.reward >= 1 for words, verdict in pairs}
    return majority([words or None for words in item.said], right)


def apart(graded: Sequence[Graded], grader: str) -> float:
    """Share of all answers on which this further grader says otherwise than the first."""
    return fmean(
        (ours.reward >= 1) != (theirs.reward >= 1)
        for item in graded
        for ours, theirs in zip(item.verdicts, item.others[grader], strict=True)
    )


@dataclass(frozen=True, slots=True)
class Average:
    """Over benchmarks, unweighted."""

    accuracy: float
    interval: tuple[float, float]


def average(every: Sequence[Scores], seed: int = 0) -> Average:
    """seed: of the interval's resamples."""
    return Average(fmean(s.accuracy for s in every), interval([s.by_question for s in every], seed=seed))


def compare(
    ours: Sequence[Scores], theirs: Sequence[Scores], seed: int = 0
) -> dict[str, tuple[float, float, float, float]]:
    """(difference, low, high, p) of each benchmark, and of the average where there are several."""
    found = {
        a.benchmark: difference([a.by_question], [b.by_question], seed=seed) for a, b in zip(ours, theirs, strict=True)
    }
    if len(ours) > 1:
        found["average"] = difference([a.by_question for a in ours], [b.by_question for b in theirs], seed=seed)
    return found
