"""Results that papers have published, to stand beside one's own: `published.csv`, read from the papers.

A number belongs to its grader: LUFFY's first tables are by math-verify, later ones by three stricter tests ("oat"; ours
are `boxed`). Where we do not know who graded, it says "not verified".
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

BENCHMARKS = {
    "AIME24": ("aime24", "aime"),
    "AIME25": ("aime25",),
    "AMC": ("amc",),
    "MATH500": ("math500", "math"),
    "Minerva": ("minerva",),
    "Olympiad": ("olympiad", "olympiad_bench"),
    "ARC-c": ("arc_c",),
    "GPQA-D": ("gpqa",),
    "MMLU-Pro": ("mmlu_pro",),
}
"""Published name -> names here, of suites and of LUFFY's files."""
COMMON = {"aime": 30, "math": 500}
"""Names that many a set has: the benchmark is meant where it is as large."""


@dataclass(frozen=True, slots=True)
class Published:
    """A row of a paper's table."""

    source: str
    grader: str
    base_model: str
    method: str
    percent: dict[str, float]
    """By the benchmark's published name; an average by its own."""
    note: str


@cache
def published() -> tuple[Published, ...]:
    """All rows, as the papers have them in order."""
    about = ("source", "grader", "base_model", "method", "note")
    with (files("luffy.evaluation") / "published.csv").open(encoding="utf-8") as file:
        return tuple(
            Published(
                **{name: row[name] for name in about},
                percent={name: float(value) for name, value in row.items() if name not in about and value},
            )
            for row in csv.DictReader(file)
        )


def published_name(benchmark: str, questions: int) -> str | None:
    """Of a benchmark of ours; None where no paper has it."""
    if COMMON.get(benchmark, questions) != questions:
        return None
    return next((name for name, ours in BENCHMARKS.items() if benchmark in ours), None)


def beside(benchmarks: Mapping[str, int]) -> list[Published]:
    """Those with a number for one of these benchmarks (name: questions), as the papers have them in order."""
    names = {published_name(*benchmark) for benchmark in benchmarks.items()}
    return [row for row in published() if names & row.percent.keys()]
