"""`luffy data gym`: a file of problems of one of reasoning-gym's tasks.

luffy data gym chain_sum --count 2000 --seed 1 --out chains.jsonl --set max_terms=4
luffy train my.toml --data.path chains.jsonl --reward.grader gym --objective.name dr_grpo
"""

import argparse
import json
from pathlib import Path
from typing import Any

from luffy.commands.arguments import add_command, add_json, add_seed, whole
from luffy.errors import UserError


def add_gym(commands: Any) -> None:
    gym = add_command(
        commands,
        "gym",
        run_gym,
        help="make problems of a task of reasoning-gym, for the grader `gym`",
        examples=(
            "luffy data gym countdown --count 2000 --out countdown.jsonl --set max_numbers=4",
            "luffy data gym chain_sum --count 200 --seed 1 --out judged.jsonl --set min_terms=3 max_terms=4",
        ),
    )
    gym.add_argument("task", metavar="TASK", help="such as chain_sum, sudoku, countdown")
    gym.add_argument("--count", type=whole, default=1000, metavar="N", help="problems (default: %(default)s)")
    add_seed(gym, "the problems; another one for those to be judged by")
    gym.add_argument("--out", required=True, metavar="FILE.jsonl", help="where to write the problems")
    gym.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the task's own options, such as max_terms=4"
    )
    add_json(gym)


def run_gym(args: argparse.Namespace) -> int:
    """Write the file, whole or not at all.

    Raises:
        UserError: the package is missing, or knows no such task, option or value.
    """
    from luffy.console import print_json
    from luffy.files import write_text
    from luffy.problems.gym import make_rows
    from luffy.wording import counted

    config = dict(_pair(text) for text in args.set)
    if args.count < 1:
        raise UserError(f"gym: --count must be positive, got {args.count}")
    rows = make_rows(args.task, args.count, args.seed, config)
    write_text(Path(args.out), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if args.json:
        print_json({"out": args.out, "task": args.task, "problems": len(rows)})
        return 0
    print(f"{args.out}: {counted(len(rows), 'problem')} of {args.task}; train on them with --reward.grader gym")
    return 0


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UserError(f"gym: --set takes KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
