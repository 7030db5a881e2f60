"""Benchmarks by name, wherever their rows are.

    math    AIME 2024, AIME 2025, AMC, MATH-500, Minerva, OlympiadBench     the six of LUFFY's tables
    ood     ARC-challenge, GPQA-diamond, MMLU-Pro                           multiple choice
    quick   sums of digits, made on the spot                                for a laptop

Rows come from `$LUFFY_CACHE/benchmarks/NAME.parquet` (or .jsonl) where there is such a file, in the benchmark's own
columns or in any schema of docs/data.md, and from the Hugging Face data set otherwise. Which data sets the papers used
is not known for all of them; LUFFY's own files (`valid.all.parquet`) can stand in: `--data` takes one as it is. Columns
and names of the data sets are from public code that reads them; none was downloaded here.
"""

import random
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from luffy.data.load import convert, unique
from luffy.data.problem import DataError, Problem
from luffy.data.rows import SUFFIXES, SourceRow, read_rows
from luffy.embedded import cache_dir
from luffy.errors import UserError, first_line
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


def problems_of(name: str, *, seed: int = 0, limit: int | None = None) -> list[Problem]:
    """Of a benchmark, in order. seed: of the order of options, 0: as they are.

    Raises:
        UserError: it is neither here nor to be downloaded, with the file to place and where; or rows that are not its.
    """
    if name == "quick":
        return quick(limit)
    benchmark = NAMES[name]
    places = [cache_dir() / "benchmarks" / f"{name}{suffix}" for suffix in SUFFIXES]
    place = next((path for path in places if path.is_file()), None)
    try:
        found = list(_problems(benchmark, place or benchmark.source, benchmark.split if place is None else None, seed))
    except (DataError, OSError) as error:
        if place is not None:
            raise UserError(f"eval: {error}") from error
        raise UserError(
            f"eval: {benchmark.title} cannot be downloaded ({first_line(error):.200}); place its rows at "
            f"{places[0]} (or .jsonl), with the columns {', '.join(benchmark.columns)} of {benchmark.source} or in a "
            f"schema of docs/data.md"
        ) from error
    return found[:limit]


def _problems(benchmark: Benchmark, source: Any, split: str | None, seed: int) -> Iterator[Problem]:
    rows = list(read_rows(source, split))
    if not rows:
        raise DataError(f"{source}: no rows")
    if set(benchmark.columns) <= set(rows[0].values):
        return unique(_read(benchmark, row, at, seed) for at, row in enumerate(rows))
    return unique(problem for _, _, problem in convert(rows))


def _read(benchmark: Benchmark, row: SourceRow, at: int, seed: int) -> Problem:
    try:
        question, answer = benchmark.read(row.values, seed)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        kind = type(error).__name__
        raise DataError(f"{row.where}: not a row of {benchmark.title} ({kind}: {error})") from error
    if not question or not answer:
        raise DataError(f"{row.where}: {benchmark.title}'s row has no {'answer' if question else 'question'}")
    messages = ({"role": "user", "content": question},)
    return Problem(id=f"{benchmark.name}/{at}", data_source=benchmark.name, messages=messages, answer=answer)


def quick(limit: int | None) -> list[Problem]:
    """The quickstart's held-out problems."""
    from luffy.config_file import load_config
    from luffy.data import load_problems
    from luffy.sources import evaluation_sources

    return load_problems(evaluation_sources(load_config("quickstart"))["heldout"], limit=limit)
