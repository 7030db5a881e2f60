"""The verifier pool against math-verify one answer after the other, on the same answers.

    python -m bench.graders [--data FILE] [--workers N] [--rounds N] [--store]
    python -m bench.graders --cases     what graders get wrong in tests/grader_cases.tsv, into docs/grading.md

Answers: of every different gold of the file, itself in a box behind a sentence, and the next one's, half of them in
words and without a box. Rounds take turns; the cache never helps, since no answer comes twice and every pool is new.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.report import put
from luffy.data import load_problems
from luffy.rewards import VerifierPool
from luffy.rewards.graders import symbolic, warm_up

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data" / "luffy_valid.parquet"
CASES = ROOT / "tests" / "grader_cases.tsv"
PAGE = ROOT / "docs" / "grading.md"
RESULTS = ROOT / "bench" / "results" / "graders.json"


def answers(path: Path) -> list[tuple[str, str]]:
    """(response, gold)"""
    found = [p.answer if isinstance(p.answer, str) else p.answer[0] for p in load_problems(path)]
    golds = list(dict.fromkeys(found))
    pairs = []
    for at, gold in enumerate(golds):
        other = golds[(at + 1) % len(golds)]
        pairs.append((f"We add 3 and 4 to get 7, and so on. So the answer is \\boxed{{{gold}}}.", gold))
        pairs.append((f"Therefore the result is ${other}$." if at % 2 else f"It is \\boxed{{{other}}}.", gold))
    return pairs


def timed(grade: Callable[[], list[bool]]) -> tuple[float, list[bool]]:
    began = time.perf_counter()
    verdicts = grade()
    return time.perf_counter() - began, verdicts


def measure(pairs: list[tuple[str, str]], workers: int, rounds: int) -> dict:
    from luffy.rewards.graders import _parse_gold

    warm_up()
    serial, pooled, same = [], [], True
    for _ in range(rounds):
        _parse_gold.cache_clear()
        seconds, one = timed(lambda: [symbolic(response, (gold,)) for response, gold in pairs])
        serial.append(seconds)
        with VerifierPool("answer", workers=workers, timeout_s=30) as pool:
            pool.grade([(f"\\boxed{{{n}}}", "0") for n in range(workers)])  # all have started
            seconds, other = timed(lambda pool=pool: [v.reward >= 1 for v in pool.grade(pairs)])
        pooled.append(seconds)
        same &= one == other
    times = {"serial_s": round(median(serial), 2), "pool_s": round(median(pooled), 2)}
    ratio = round(median(a / b for a, b in zip(serial, pooled, strict=True)), 2)
    return (
        {"answers": len(pairs), "workers": workers, "rounds": rounds} | times | {"ratio": ratio, "same_verdicts": same}
    )


def table(found: dict) -> str:
    return (
        f"{found['answers']:,} answers: math-verify one after the other {found['serial_s']} s, the pool of "
        f"{found['workers']} {found['pool_s']} s, {found['ratio']} times as fast (median of {found['rounds']} rounds), "
        f"{'the same verdicts' if found['same_verdicts'] else 'OTHER VERDICTS'}"
    )


@dataclass(frozen=True)
class Case:
    area: str
    response: str
    gold: str
    right: bool
    verdicts: dict[str, float]
    """By grader."""


def cases() -> list[Case]:
    found, area, free = [], "", False
    for line in CASES.read_text(encoding="utf-8").splitlines()[2:]:
        if line.startswith("# "):
            area, free = line[2:].split(":")[0].removesuffix(" (free)"), "(free):" in line
            continue
        said, gold, right, verdicts = line.split("\t")
        marks = {name: float(mark) for name, mark in (verdict.split("=") for verdict in verdicts.split())}
        found.append(Case(area, said if free else f"so \\boxed{{{said}}}.", gold, right == "1", marks))
    return found


def cases_table() -> str:
    """Of each area, right answers that a grader turns down + wrong ones that it takes."""
    graders = ("answer", "boxed", "deepscaler", "choice")
    lines = [
        "| answers with | cases | " + " | ".join(f"`{g}`" for g in graders) + " |",
        "|---|---:" + "|---:" * 4 + "|",
    ]
    every = cases()
    for area in dict.fromkeys(case.area for case in every):
        those = [case for case in every if case.area == area]
        lines.append(f"| {area} | {len(those)} | " + " | ".join(errors(those, grader) for grader in graders) + " |")
    lines.append(f"| all | {len(every)} | " + " | ".join(errors(every, grader) for grader in graders) + " |")
    return "\n".join(lines)


def errors(those: list[Case], grader: str) -> str:
    asked = [case for case in those if grader in case.verdicts]
    down = sum(case.right and case.verdicts[grader] < 1 for case in asked)
    taken = sum(not case.right and case.verdicts[grader] >= 1 for case in asked)
    return f"{down} + {taken}" if asked else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="problems with golds (default: LUFFY's validation set)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", action="store_true", help="write the table of cases and do nothing else")
    parser.add_argument("--store", action="store_true", help="keep it in bench/results, and in docs/grading.md")
    args = parser.parse_args()
    if args.cases:
        put(PAGE, "cases", cases_table())
        return 0
    if not args.data.exists():
        print(f"bench.graders: {args.data} is not there: skipped")
        return 0
    logging.disable(logging.ERROR)
    found = measure(answers(args.data), args.workers, args.rounds)
    print(table(found))
    if args.store:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        put(PAGE, "throughput", table(found))
    return int(not found["same_verdicts"])


if __name__ == "__main__":
    raise SystemExit(main())
