"""`luffy data prepare` on the command line. Heavy imports happen inside `run_prepare`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from luffy.commands.arguments import add_command, add_json, add_problems, add_quiet, positive, whole

if TYPE_CHECKING:
    from luffy.prepare.tally import Tally


def add_prepare(commands: Any) -> None:
    parser = add_command(
        commands,
        "prepare",
        run_prepare,
        help="make a training set in LUFFY's schema, each filter counted",
        description="Write a training set in LUFFY's schema, and report.json with what each filter left out. A call "
        "that was killed is taken up again by the same command.",
        examples=(
            "luffy data prepare openr1 --out data/openr1",
            "luffy data prepare raw.parquet --out data/mine --limit 5000 --verify answer --tokenizer ./model",
            "luffy data prepare mine/problems --out data/mine --complement test.parquet --traces 4 --json",
        ),
    )
    parser.add_argument("source", metavar="SOURCE", help="openr1, a file, a folder, or a dataset id")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of train.parquet and report.json")
    add_problems(parser)
    parser.add_argument("--revision", metavar="COMMIT", help="of a dataset id (default: the newest)")
    parser.add_argument("--traces", type=whole, default=1, metavar="N", help="of each problem at most (default: 1)")
    parser.add_argument(
        "--max-prompt-tokens", type=positive, metavar="N", help="longest prompt (default: training filters them itself)"
    )
    parser.add_argument(
        "--max-trace-tokens",
        dest="max_tokens",
        type=positive,
        default=8192,
        metavar="N",
        help="longest trace (default: %(default)s)",
    )
    parser.add_argument(
        "--tokenizer",
        default="Qwen/Qwen2.5-Math-7B",
        metavar="NAME",
        help="that counts tokens: folder, Hugging Face id or embedded: (default: %(default)s)",
    )
    parser.add_argument(
        "--verify",
        nargs="?",
        const="answer",
        metavar="GRADER",
        help="grade the traces, whatever the source says of them",
    )
    parser.add_argument("--complement", metavar="SOURCE", help="leave out the problems that this source has")
    parser.add_argument("--no-system", dest="system", action="store_false", help="leave out LUFFY's system turn")
    add_quiet(parser)
    add_json(parser)


def run_prepare(args: argparse.Namespace) -> int:
    import dataclasses

    from luffy.console import print_json
    from luffy.errors import user_errors
    from luffy.prepare.options import Options
    from luffy.prepare.parts import prepare
    from luffy.prepare.tally import Tally
    from luffy.process import prepare_libraries

    prepare_libraries()
    given = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(Options) if hasattr(args, field.name)
    }
    with user_errors("data"):
        try:
            report = prepare(Options(**given), args.out, _progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same command goes on from here") from None
    if args.json:
        print_json(report)
        return 0
    print("\n".join(Tally.of(report).lines()))
    print(f"{args.out}/{report['file']}, what was left out in {args.out}/report.json")
    return 0


def _progress(tally: Tally) -> None:
    from luffy.console import is_live

    if is_live():
        end = f"\r{tally.problems['read']:,} problems read, {tally.problems['kept']:,} kept "
        print(end, end="", file=sys.stderr, flush=True)
