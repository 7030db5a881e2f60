"""Which benchmarks there are, and how a row of one is read.

    math    AIME 2024, AIME 2025, AMC, MATH-500, Minerva, OlympiadBench     the six of LUFFY's tables
    ood     ARC-challenge, GPQA-diamond, MMLU-Pro                           multiple choice
    quick   sums of digits, made on the spot                                for a laptop

Which data sets the papers used is not known for all of them. Columns and names of the data sets are from public code
that reads them; none was downloaded here. suites.py finds the rows; `luffy eval --help` needs only the names.
"""

import random
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from luffy.seeds import derive

Row = Mapping[str, Any]
Read = Callable[[Row, int], tuple[str, str | tuple[str, ...]]]
"""(a row, seed of its options) -> (question, accepted answer or answers)."""

LETTERS = string.ascii_uppercase
ASK = "Put the letter of the right option in \\boxed{}."


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Where its rows are and how one is read."""

    name: str
    title: str
    source: str
    """Hugging Face data set id."""
    split: str
    columns: tuple[str, ...]
    """That `read` needs."""
    read: Read
    repeats: int = 1
    """Answers to a problem in the published protocol."""


def solved(question: str, answer: str) -> Read:
    """A question and its answer, or answers, in columns of these names."""

    def read(row: Row, seed: int) -> tuple[str, str | tuple[str, ...]]:
        value = row[answer]
        many = isinstance(value, list)
        golds = tuple(written(one) for one in (value if many else [value]))
        return str(row[question]).strip(), golds if many and len(golds) > 1 else golds[0]

    return read


def written(value: Any) -> str:
    """142.0 -> 142: AMC's answers are numbers with a point."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def arc(row: Row, seed: int) -> tuple[str, str]:
    """Some of its labels are digits; here all are letters."""
    right = row["choices"]["label"].index(row["answerKey"])
    return choice(row["question"], row["choices"]["text"], right, seed)


def gpqa(row: Row, seed: int) -> tuple[str, str]:
    """The right option is the first in the file, and never stays there unasked: it is always shuffled."""
    options = [row["Correct Answer"], *(row[f"Incorrect Answer {n}"] for n in (1, 2, 3))]
    return choice(row["Question"], options, 0, seed or 1)


def mmlu_pro(row: Row, seed: int) -> tuple[str, str]:
    return choice(row["question"], row["options"], int(row["answer_index"]), seed)


def choice(question: str, options: list[str], right: int, seed: int) -> tuple[str, str]:
    """(question with its options, letter of the right one). seed: of their order; 0: as they are."""
    order = list(range(len(options)))
    if seed:
        random.Random(derive(seed, "options", question)).shuffle(order)
    lines = [f"{LETTERS[at]}) {options[which].strip()}" for at, which in enumerate(order)]
    return "\n".join([question.strip(), "", *lines, "", ASK]), LETTERS[order.index(right)]


PAIR = ("problem", "answer")
BENCHMARKS = (
    Benchmark("aime24", "AIME 2024", "HuggingFaceH4/aime_2024", "train", PAIR, solved(*PAIR), 32),
    Benchmark("aime25", "AIME 2025", "math-ai/aime25", "test", PAIR, solved(*PAIR), 32),
    Benchmark("amc", "AMC", "AI-MO/aimo-validation-amc", "train", PAIR, solved(*PAIR), 32),
    Benchmark("math500", "MATH-500", "HuggingFaceH4/MATH-500", "test", PAIR, solved(*PAIR)),
    Benchmark(
        "minerva", "Minerva", "math-ai/minervamath", "test", ("question", "answer"), solved("question", "answer")
    ),
    Benchmark(
        "olympiad",
        "OlympiadBench",
        "Hothan/OlympiadBench:OE_TO_maths_en_COMP",
        "train",
        ("question", "final_answer"),
        solved("question", "final_answer"),
    ),
    Benchmark("arc_c", "ARC-c", "allenai/ai2_arc:ARC-Challenge", "test", ("question", "choices", "answerKey"), arc),
    Benchmark(
        "gpqa",
        "GPQA-diamond",
        "Idavidrein/gpqa:gpqa_diamond",
        "train",
        ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
        gpqa,
    ),
    Benchmark("mmlu_pro", "MMLU-Pro", "TIGER-Lab/MMLU-Pro", "test", ("question", "options", "answer_index"), mmlu_pro),
)
NAMES = {benchmark.name: benchmark for benchmark in BENCHMARKS}
SUITES = {
    "math": ("aime24", "aime25", "amc", "math500", "minerva", "olympiad"),
    "ood": ("arc_c", "gpqa", "mmlu_pro"),
    "quick": ("quick",),
}


def benchmarks_in(suites: list[str]) -> list[str]:
    """Names of the benchmarks of suites, or benchmarks, each once."""
    return list(dict.fromkeys(name for suite in suites for name in SUITES.get(suite, (suite,))))
