"""`luffy grade`."""

import argparse
from pathlib import Path
from typing import Any

from luffy.commands.arguments import add_command, add_grading, add_json, positive


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
    from luffy.report import print_grades

    out = Path(args.out) if args.out else None
    options = {"compare": args.compare, "workers": args.workers, "timeout_s": args.timeout, "shown": args.show}
    found = grade_file(Path(args.file), args.grader, out=out, **options)
    if args.json:
        print_json(found.record(args.grader, args.compare))
    else:
        print_grades(found, args.grader, args.compare)
    return 0
