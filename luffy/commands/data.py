"""`luffy data`: check and score; gym is in a file of its own, prepare beside its code."""

import argparse
from pathlib import Path
from typing import Any

from luffy.commands.arguments import (
    EMBEDDED,
    add_command,
    add_engine,
    add_grading,
    add_json,
    add_problems,
    add_quiet,
    add_template,
    positive,
)
from luffy.commands.gym import add_gym
from luffy.errors import UserError
from luffy.opening import STYLES
from luffy.prepare.command import add_prepare


def add_data(commands: Any) -> None:
    data = add_command(
        commands,
        "data",
        None,
        help="look at problems before a run is spent on them, prepare or score them",
        examples=(
            "luffy data check train.parquet --against test.parquet",
            "luffy data prepare openr1 --out data/openr1",
            "luffy data gym countdown --out countdown.jsonl",
            "luffy data score train.parquet --model Qwen/Qwen2.5-7B --recipe gsm8k-smoke --out scored.parquet",
        ),
    )
    whats = data.add_subparsers(dest="what", required=True, metavar="check|gym|prepare|score")
    _add_check(whats)
    add_gym(whats)
    add_prepare(whats)
    _add_score(whats)


def _add_check(commands: Any) -> None:
    check = add_command(
        commands,
        "check",
        run_check,
        help="lengths, rendering, traces by the verifier, problems that are also judged by",
        description="Read problems as training would, and say what is in them and what is wrong with them, which makes "
        "the exit code 1.",
        examples=(
            "luffy data check train.parquet",
            "luffy data check train.jsonl --against test.parquet --grader none",
            "luffy data check train.parquet --model Qwen/Qwen2.5-Math-7B --template luffy --max-trace-tokens 8192",
            "luffy data check train.parquet --limit 500 --json",
        ),
    )
    check.add_argument("file", metavar="SOURCE", help="parquet or JSONL file, folder, or dataset id")
    add_problems(check)
    check.add_argument("--against", nargs="+", default=[], metavar="SOURCE", help="problems that a run is judged by")
    check.add_argument(
        "--words", type=positive, default=13, metavar="N", help="in a row that make questions alike (default: 13)"
    )
    check.add_argument(
        "--grader", default="answer", metavar="GRADER", help="as reward.grader; none: grade no trace (default: answer)"
    )
    check.add_argument("--model", default=EMBEDDED, metavar="MODEL", help="whose tokenizer (default: %(default)s)")
    add_template(check, "the model's chat")
    for what, most in (("prompt", 1024), ("trace", 8192)):
        check.add_argument(
            f"--max-{what}-tokens",
            type=positive,
            default=most,
            metavar="N",
            help=f"longest {what} (default: %(default)s)",
        )
    add_grading(check)
    add_quiet(check)
    add_json(check)


def _add_score(commands: Any) -> None:
    score = add_command(
        commands,
        "score",
        run_score,
        help="add the log-probs of traces under the model that wrote them",
        description="Write a copy of a file with the log-probs of its traces under the model that wrote them. A call "
        "that was killed is taken up again by the same command.",
        examples=(
            "luffy data score train.parquet --model Qwen/Qwen2.5-7B --recipe gsm8k-smoke --out scored.parquet",
            "luffy data score train.jsonl --model ./teacher --student ./student --teacher r1 --out scored.jsonl",
        ),
    )
    score.add_argument("file", metavar="FILE", help="parquet or JSONL file in LUFFY's schema; it stays as it is")
    score.add_argument("--model", required=True, metavar="MODEL", help="the teacher: model folder or Hugging Face id")
    score.add_argument("--out", required=True, metavar="FILE", help="where to write the file with its scores")
    score.add_argument("--student", metavar="MODEL", help="model that will be trained, whose tokens are scored")
    score.add_argument("--recipe", metavar="RECIPE|FILE.toml", help="of that training; --student need not be given")
    add_template(score, "the recipe's, else the model's chat")
    score.add_argument(
        "--teacher-template",
        choices=STYLES,
        metavar="T",
        help=f"show it prompts in its own template: {', '.join(STYLES)} (default: as the student sees them)",
    )
    score.add_argument(
        "--teacher", metavar="NAME", help="in the file: score its traces alone (default: the end of the model's name)"
    )
    score.add_argument(
        "--max-tokens",
        type=positive,
        default=16384,
        metavar="N",
        help="longest prompt and trace (default: %(default)s)",
    )
    score.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the teacher (default: %(default)s)"
    )
    add_engine(score, memory_fraction=0.85)
    add_quiet(score)
    add_json(score)


def run_check(args: argparse.Namespace) -> int:
    """0, or 1 where something is wrong with the problems."""
    from contextlib import nullcontext

    from luffy.config import ModelConfig
    from luffy.console import print_json
    from luffy.data import load_problems
    from luffy.data_check import check, report
    from luffy.errors import user_errors
    from luffy.opening import set_template
    from luffy.process import prepare_libraries
    from luffy.rewards import VerifierPool
    from luffy.sources import load_template, resolve

    prepare_libraries()
    with user_errors("data"):
        problems = load_problems(args.file, split=args.split, limit=args.limit)
        against = {name: load_problems(name) for name in args.against}
        model = ModelConfig(name=args.model)
        set_template(model, args.template)
        template = load_template(resolve(model), model)
        pool = nullcontext() if args.grader == "none" else VerifierPool(args.grader, args.workers, args.timeout)
        with pool as verifier:
            limits = {name: getattr(args, name) for name in ("max_prompt_tokens", "max_trace_tokens")}
            found = check(problems, template, verifier, against, words=args.words, **limits)
    if args.json:
        print_json(found.record())
    else:
        print("\n".join(report(found, problems, template)))
    return int(bool(found.wrong))


def run_score(args: argparse.Namespace) -> int:
    from luffy.config import ModelConfig
    from luffy.config_file import load_config
    from luffy.console import print_json
    from luffy.opening import set_template
    from luffy.process import prepare_libraries

    if not (args.student or args.recipe):
        raise UserError("score: --student or --recipe must say which model will be trained: its tokens are scored")
    prepare_libraries()
    student = load_config(args.recipe).model if args.recipe else ModelConfig()
    student.name = args.student or student.name
    set_template(student, args.template)
    from luffy.score import score

    counts = score(args, student)
    if args.json:
        print_json({"out": str(Path(args.out)), "counts": dict(counts)})
    else:
        print(f"{args.out}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    return 0
