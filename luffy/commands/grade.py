"""`luffy grade`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luffy.commands.arguments import add_command, add_grading, add_json, positive

if TYPE_CHECKING:
    from luffy.grade import Graded
    from luffy.rewards import Verdict

WIDEST = 60
"""Characters of a text in a line."""


def add_grade(commands: Any) -> None:
    grade = add_command(
        commands,
        "grade",
        run_grade,
        help="grade answers that lie in a file, by one grader or two",
        examples=(
            "luffy grade answers.jsonl --grader boxed",
            "luffy grade answers.jsonl --grader boxed --compare train --show 5",
            "luffy grade answers.jsonl --grader mine:grade --out graded.jsonl --json",
        ),
    )
    grade.add_argument("file", metavar="FILE.jsonl", help="lines with `response` and `answer`")
    grade.add_argument(
        "--grader", required=True, metavar="GRADER", help="as reward.grader: boxed, train, answer, choice, ..."
    )
    grade.add_argument("--compare", metavar="GRADER", help="grade by this one too, and show where they disagree")
    grade.add_argument("--out", metavar="FILE", help="write the lines with `reward` and `verdict`, in order")
    grade.add_argument(
        "--show", type=positive, default=20, metavar="N", help="disagreements to show (default: %(default)s)"
    )
    add_grading(grade)
    add_json(grade)


def run_grade(args: argparse.Namespace) -> int:
    from luffy.console import print_json
    from luffy.grade import grade_file

    out = Path(args.out) if args.out else None
    options = {"compare": args.compare, "workers": args.workers, "timeout_s": args.timeout, "shown": args.show}
    found = grade_file(Path(args.file), args.grader, out=out, **options)
    if args.json:
        print_json(found.record(args.grader, args.compare))
    else:
        print_grades(found, args.grader, args.compare)
    return 0


def print_grades(found: "Graded", grader: str, compare: str | None) -> None:
    """Where two graders disagree, then what the first of them gave."""
    from luffy.console import tell
    from luffy.rewards import label
    from luffy.rewards.texts import final_answer

    for line, ours, theirs in found.disagreements:
        id = line.row.get("id")
        where = f"line {line.number}" + (f", id {id}" if id is not None else "")
        marks = f"{grader} {_mark(ours)}, {compare} {_mark(theirs)}"
        said = final_answer(line.response)
        tell(f"{where}: {marks}   answer {_short(line.answer)}   given {_short(said)}")
    if compare:
        both = [f"{found.together[pair]:,}" for pair in ((True, True), (False, False), (True, False), (False, True))]
        tell(
            f"{label(grader)} and {label(compare)}: both right {both[0]}, both wrong {both[1]}, right by the first "
            f"alone {both[2]}, by the second alone {both[3]}"
        )
    tell(
        f"{label(grader)}: {found.right:,} of {found.lines:,} right ({found.right / found.lines:.1%}), mean reward "
        f"{found.rewards / found.lines:.4f}, timeouts {found.statuses['timeout']}, crashes {found.statuses['crash']}"
    )


def _mark(verdict: "Verdict") -> str:
    return f"{verdict.reward:g}" if verdict.status == "ok" else verdict.status


def _short(text: Any) -> str:
    shown = repr(text)
    return shown if len(shown) <= WIDEST else f"{shown[: WIDEST - 4]}...{shown[-1]}"
