"""The verifier pool against math-verify one answer after the other, on the same answers.

    python -m bench.graders [--data FILE] [--workers N] [--rounds N] [--store]
    python -m bench.graders --cases     what graders get wrong in tests/grader_cases.tsv, into docs/grading.md

Answers: of every row of the file a sentence with a box, which holds its gold or, every other time, the next row's.
Rounds take turns, all in fresh processes: what sympy remembers of a gold would flatter whoever meets it again. A fifth
of the rows comes first and is not timed, so that math-verify has learned its grammar; the pool's cache never helps,
since no answer comes twice.
"""

import argparse
import json
import logging
import subprocess
import sys
import time
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


def answers(path: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(response, gold) of the rows that come first, and of those that are timed."""
    golds = [p.answer if isinstance(p.answer, str) else p.answer[0] for p in load_problems(path)]
    pairs = [
        (f"({at}) We add 3 and 4 to get 7. So the answer is \\boxed{{{golds[(at + at % 2) % len(golds)]}}}.", gold)
        for at, gold in enumerate(golds)
    ]
    return pairs[::5], [pair for at, pair in enumerate(pairs) if at % 5]


def serial(path: Path) -> tuple[float, list[bool]]:
    """Seconds and verdicts of math-verify, one answer after the other."""
    first, pairs = answers(path)
    warm_up()
    for response, gold in first:
        symbolic(response, (gold,))
    began = time.perf_counter()
    verdicts = [symbolic(response, (gold,)) for response, gold in pairs]
    return time.perf_counter() - began, verdicts


def pooled(path: Path, workers: int) -> tuple[float, list[bool]]:
    first, pairs = answers(path)
    with VerifierPool("answer", workers=workers, timeout_s=30) as pool:
        pool.grade(first)
        began = time.perf_counter()
        verdicts = pool.grade(pairs)
        return time.perf_counter() - began, [verdict.reward >= 1 for verdict in verdicts]


def measure(path: Path, workers: int, rounds: int) -> dict:
    alone, together, same = [], [], True
    for _ in range(rounds):
        command = [sys.executable, "-m", "bench.graders", "--serial", "--data", str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        seconds, one = json.loads(done.stdout)
        alone.append(seconds)
        seconds, other = pooled(path, workers)
        together.append(seconds)
        same &= one == other
    times = {"serial_s": round(median(alone), 2), "pool_s": round(median(together), 2)}
    ratio = round(median(a / b for a, b in zip(alone, together, strict=True)), 2)
    return {"answers": len(one), "workers": workers, "rounds": rounds} | times | {"ratio": ratio, "same_verdicts": same}


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
    parser.add_argument("--serial", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--store", action="store_true", help="keep it in bench/results, and in docs/grading.md")
    args = parser.parse_args()
    if args.cases:
        put(PAGE, "cases", cases_table())
        return 0
    if not args.data.exists():
        print(f"bench.graders: {args.data} is not there: skipped")
        return 0
    logging.disable(logging.ERROR)
    if args.serial:
        print(json.dumps(serial(args.data)))
        return 0
    found = measure(args.data, args.workers, args.rounds)
    print(table(found))
    if args.store:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        put(PAGE, "throughput", table(found))
    return int(not found["same_verdicts"])


if __name__ == "__main__":
    raise SystemExit(main())
