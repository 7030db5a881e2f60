"""The `luffy` command: train, eval, grade, generate, report.

Heavy imports happen inside the commands, so `--help` and a mistyped key answer at once. Exit codes: 0 done, 2 something
the user can mend (one sentence on stderr), 130 interrupted. Training with many ranks (docs/multi-node.md) ends with the
code of the rank that failed first, and with 0 after SIGTERM, once it has saved.
"""

import argparse
import sys
from typing import Any

from luffy.errors import UserError
from luffy.evaluation.command import add_eval, check_eval, run_eval
from luffy.generate import add_generate, check_generate, run_generate
from luffy.launch import add_options
from luffy.opening import STYLES, TEMPLATES
from luffy.prepare.command import add_prepare, run_prepare
from luffy.problems.gym import add_gym, run_gym
from luffy.recipe_book import add_recipes, run_recipes
from luffy.reporting.command import add_report, run_report


def main(argv: list[str] | None = None) -> int:
    argv = _spell_out_resume(sys.argv[1:] if argv is None else argv)
    args, rest = build_parser().parse_known_args(argv)
    if rest and args.command not in ("train", "plan"):
        build_parser().parse_args(argv)  # ends with argparse's own message
    try:
        commands = {
            "train": run_train,
            "eval": run_evaluation,
            "generate": run_generation,
            "plan": run_plan,
            "grade": run_grade,
            "report": lambda args, _: run_report(args),
            "recipes": lambda args, _: run_recipes(args),
        }
        return (commands | {"doctor": run_doctor, "data": run_data})[args.command](args, rest)
    except UserError as error:
        from luffy.failure import say_failure

        say_failure(error)
        return 2
    except KeyboardInterrupt as stopped:
        from luffy.rank import exit_code, speaks

        if speaks():
            print(f"luffy: {str(stopped) or 'interrupted'}", file=sys.stderr)
        return exit_code(stopped)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="luffy", description="Train reasoning models under off-policy guidance.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train as a recipe or TOML file says",
        usage=(
            "luffy train RECIPE|FILE.toml [--run-dir DIR] [--resume [auto]] [--nproc-per-node N ...] "
            "[--section.key VALUE ...]"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train as a recipe or TOML file says. Any key can be overridden: --optim.lr 2e-5",
        epilog=keys_help() if _wants_help(("train",)) else None,
    )
    train.add_argument("source", metavar="RECIPE|FILE.toml")
    train.add_argument("--run-dir", metavar="DIR", help="run folder (default: runs/NAME of the recipe)")
    train.add_argument(
        "--resume",
        choices=("auto",),
        metavar="[auto]",
        help="continue the run in the folder, or start it if there is none; print it again if complete",
    )
    add_options(train)

    plan = commands.add_parser(
        "plan",
        help="memory and time of a run, before anything is downloaded",
        usage=(
            "luffy plan RECIPE|FILE.toml [--model NAME] [--gpus N] [--gpu KIND] [--context TOKENS] [--json] "
            "[--section.key VALUE ...]"
        ),
        description="Predict what a run needs on each GPU and what a step takes; suggest a mesh and a budget that fit.",
    )
    plan.add_argument("source", metavar="RECIPE|FILE.toml")
    plan.add_argument("--model", metavar="NAME", help="folder, well-known model or Hugging Face id, not the recipe's")
    plan.add_argument("--gpus", type=int, metavar="N", help="GPUs, a rank each (default: 8; of a cpu 1)")
    plan.add_argument("--gpu", default="h100", metavar="KIND", help="h100, a100, ... or cpu (default: h100)")
    plan.add_argument("--context", type=int, metavar="TOKENS", help="longest prompt and answer (default: the recipe's)")
    plan.add_argument("--answer-tokens", type=int, metavar="N", help="mean answer (default: half of the longest)")
    plan.add_argument("--json", action="store_true", help="print everything as JSON: bytes, seconds, FLOP")

    add_eval(commands, _add_model_options, _positive, _share)

    grade = commands.add_parser("grade", help="grade answers that lie in a file, by one grader or two")
    grade.add_argument("file", metavar="FILE.jsonl", help="lines with `response` and `answer`")
    grade.add_argument(
        "--grader", required=True, metavar="G", help="as reward.grader: boxed, train, answer, choice, ..."
    )
    grade.add_argument("--compare", metavar="G2", help="grade by this one too, and show where they disagree")
    grade.add_argument("--out", metavar="FILE2", help="write the lines with `reward` and `verdict`, in order")
    grade.add_argument("--workers", type=_positive, default=2, metavar="N", help="processes (default: %(default)s)")
    grade.add_argument("--timeout", type=_seconds, default=5.0, metavar="S", help="of an answer (default: %(default)s)")
    grade.add_argument("--show", type=_positive, default=20, metavar="N", help="disagreements (default: %(default)s)")

    add_generate(commands, _add_model_options, _positive, _share)
    add_report(commands, _positive)
    add_recipes(commands)

    data = commands.add_parser("data", help="look at problems before a run is spent on them, prepare or score them")
    whats = data.add_subparsers(dest="what", required=True, metavar="check|gym|prepare|score")
    add_prepare(whats)
    add_gym(whats)
    _add_score(whats)
    check = whats.add_parser(
        "check", help="lengths, rendering, traces by the verifier, problems that are also judged by"
    )
    check.add_argument("file", metavar="FILE", help="parquet or JSONL file, folder, or dataset id")
    check.add_argument("--split", help="of a folder, file or dataset id (default: the only one, or `train`)")
    check.add_argument("--limit", type=_positive, metavar="N", help="only the first N problems")
    check.add_argument("--against", nargs="+", default=[], metavar="FILE", help="problems that a run is judged by")
    check.add_argument("--words", type=_positive, default=13, metavar="N", help="in a row that make questions alike")
    check.add_argument("--grader", default="answer", help="as reward.grader; none: grade no trace (default: answer)")
    check.add_argument(
        "--model", default="embedded:smollm2-135m-instruct", help="whose tokenizer (default: %(default)s)"
    )
    check.add_argument("--prompt-style", choices=("chat", "luffy", "plain"), default="chat")
    check.add_argument("--max-prompt-tokens", type=_positive, default=1024, metavar="N", help="default: %(default)s")
    check.add_argument("--max-trace-tokens", type=_positive, default=8192, metavar="N", help="default: %(default)s")
    check.add_argument("--json", action="store_true", help="print what was found as JSON")

    doctor = commands.add_parser("doctor", help="what this machine has, what it lacks, and what was never run")
    doctor.add_argument(
        "--report", action="store_true", help="as Markdown for a bug report: no paths, no values of variables"
    )
    return parser


def _add_score(commands: Any) -> None:
    score = commands.add_parser("score", help="add the log-probs of traces under the model that wrote them")
    score.add_argument("file", metavar="FILE", help="parquet or JSONL file in LUFFY's schema; it stays as it is")
    score.add_argument("--model", required=True, metavar="TEACHER", help="model folder or Hugging Face id")
    score.add_argument("--out", required=True, metavar="FILE2", help="where to write the file with its scores")
    score.add_argument("--student", metavar="MODEL", help="model that will be trained, whose tokens are scored")
    score.add_argument("--recipe", metavar="RECIPE|FILE.toml", help="of that training; --student need not be given")
    score.add_argument("--prompt-style", choices=("chat", "luffy", "plain"), help="default: the recipe's, else chat")
    score.add_argument(
        "--teacher-prompt",
        choices=("chat", "luffy", "plain"),
        help="show it prompts in its own template of this style (default: as the student sees them)",
    )
    score.add_argument(
        "--teacher", metavar="NAME", help="in the file: score its traces alone (default: the end of TEACHER)"
    )
    score.add_argument("--max-tokens", type=_positive, default=16384, metavar="N", help="longest prompt and trace")
    score.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    score.add_argument(
        "--memory-fraction", type=_fraction, default=0.85, metavar="F", help="of a GPU's memory (default: %(default)s)"
    )
    score.add_argument("--kv-cache-gib", type=_gib, metavar="G", help="size of vLLM's KV cache, GiB (on a CPU: 1)")


def _add_model_options(parser: argparse.ArgumentParser, temperature: float, models: bool = False) -> None:
    default = "embedded:smollm2-135m-instruct"
    what = "run folder, model folder or Hugging Face id" + (", or several" if models else "")
    several: dict[str, Any] = {"nargs": "+", "default": [default]} if models else {"default": default}
    parser.add_argument("--model", metavar="MODEL", help=f"{what} (default: {default})", **several)
    which = "of a run folder: newest, best or a step (default: %(default)s)"
    parser.add_argument("--checkpoint", default="newest", metavar="WHICH", help=which)
    parser.add_argument(
        "--temperature", type=_not_negative, default=temperature, help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument("--max-tokens", type=_positive, default=512, metavar="N", help="default: %(default)s")
    styles = (*STYLES, *TEMPLATES)
    parser.add_argument("--template", choices=styles, help="of prompts (default: the run's own, else the model's chat)")
    parser.add_argument("--memory-fraction", type=_fraction, metavar="F", help="share of the GPU's memory for vLLM")
    parser.add_argument("--kv-cache-gib", type=_gib, metavar="G", help="size of vLLM's KV cache, GiB (on a CPU: 1)")
    parser.add_argument("--seed", type=int, default=0)


def keys_help() -> str:
    """Every configuration key with its default and meaning."""
    from luffy.config import flat_keys, recipe_names
    from luffy.objectives import KNOWN

    lines = [f"recipes: {', '.join(recipe_names())}", f"objectives: {', '.join(KNOWN)}"]
    lines += ["", "keys (default of an empty recipe; other objectives have options of their own):"]
    for key, field in flat_keys().items():
        default = field.get_default(call_default_factory=True)
        lines.append(f"  --{key} {'null' if default is None else default}")
        if field.description:
            lines.append(f"      {' '.join(field.description.split())}")
    lines += [
        "",
        "--first.KEY VALUE sets a key of a first stage alone; first.objective.name makes one (docs/baselines.md)",
    ]
    return "\n".join(lines)


def run_train(args: argparse.Namespace, overrides: list[str]) -> int:
    from luffy import launch, rank, stages
    from luffy.config import load_stages

    rank.become_rank()
    job = launch.parse(args)
    configs = load_stages(args.source, overrides)
    from luffy.run_folder import RunFolder

    whole = RunFolder(args.run_dir or f"runs/{configs[-1].name}")
    resume = args.resume is not None or rank.restarted()
    run, config = stages.due(whole, configs, resume)
    run.check(config, resume)  # before anything slow
    complete = resume and run.is_complete(config)
    # the folder was checked here: from now on the ranks, and those that a restart starts, go on with what is in it
    again = ["-m", "luffy", "train", args.source, f"--run-dir={whole.path}", "--resume", *overrides]
    if job.wanted and not complete:
        return launch.start(job, again)
    from luffy.report import draw_curves, print_result

    if not complete:
        _quiet()
        from luffy.train import train

        result = train(config, run, resume)
    if rank.speaks():
        if not (complete and run.curves.is_file()):  # a kill may come between the last step and the picture
            draw_curves(run)
        print_result(run)
    if run is not whole:  # `due` gives the first stage while it is not complete
        stages.begin_second(again, result)
    return 0


def run_plan(args: argparse.Namespace, overrides: list[str]) -> int:
    from luffy import plan, plan_text
    from luffy.config import load_config
    from luffy.machines import find_machine
    from luffy.shapes import find_shape

    config = load_config(args.source, overrides)
    machine = find_machine(args.gpu)
    shape = find_shape(args.model or config.model.name)
    gpus = (1 if machine.name == "cpu" else 8) if args.gpus is None else args.gpus
    asked = plan.ask(config, shape, machine, gpus, args.context, args.answer_tokens)
    plans = (asked, *plan.answer(asked))
    if args.json:
        import json

        print(json.dumps(plan_text.record(*plans), indent=2))
    else:
        print(plan_text.text(*plans))
    return 0


def run_evaluation(args: argparse.Namespace, _: list[str]) -> int:
    check_eval(args)
    _quiet()
    return run_eval(args)


def run_grade(args: argparse.Namespace, _: list[str]) -> int:
    from pathlib import Path

    from luffy.grade import grade_file
    from luffy.report import print_grades

    out = Path(args.out) if args.out else None
    options = {"compare": args.compare, "workers": args.workers, "timeout_s": args.timeout, "shown": args.show}
    print_grades(grade_file(Path(args.file), args.grader, out=out, **options), args.grader, args.compare)
    return 0


def run_data(args: argparse.Namespace, _: list[str]) -> int:
    _quiet()
    return {"check": run_check, "gym": run_gym, "prepare": run_prepare, "score": run_score}[args.what](args)


def run_check(args: argparse.Namespace) -> int:
    """0, or 1 where something is wrong with the problems."""
    import json
    from contextlib import nullcontext

    from luffy.config import ModelConfig, RewardConfig
    from luffy.data import load_problems
    from luffy.data_check import check, report
    from luffy.errors import user_errors
    from luffy.rewards import VerifierPool
    from luffy.sources import load_template, resolve

    with user_errors("data"):
        problems = load_problems(args.file, split=args.split, limit=args.limit)
        against = {name: load_problems(name) for name in args.against}
        model = ModelConfig(name=args.model, prompt_style=args.prompt_style)
        template, reward = load_template(resolve(model), model), RewardConfig()
        graded = args.grader != "none"
        pool = VerifierPool(args.grader, reward.workers, reward.timeout_s) if graded else nullcontext()
        with pool as verifier:
            limits = {name: getattr(args, name) for name in ("max_prompt_tokens", "max_trace_tokens")}
            found = check(problems, template, verifier, against, words=args.words, **limits)
    print(json.dumps(found.record(), indent=1) if args.json else "\n".join(report(found, problems, template)))
    return int(bool(found.wrong))


def run_score(args: argparse.Namespace) -> int:
    from luffy.config import ModelConfig, load_config

    if not (args.student or args.recipe):
        raise UserError("score: --student or --recipe must say which model will be trained: its tokens are scored")
    student = load_config(args.recipe).model if args.recipe else ModelConfig()
    student.name = args.student or student.name
    student.prompt_style = args.prompt_style or student.prompt_style
    from luffy.score import score

    counts = score(args, student)
    print(f"{args.out}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    return 0


def run_generation(args: argparse.Namespace, _: list[str]) -> int:
    check_generate(args)
    _quiet()
    return run_generate(args)


def run_doctor(args: argparse.Namespace, _: list[str]) -> int:
    from luffy.doctor import examine, print_findings, print_report

    _quiet()
    return (print_report if args.report else print_findings)(examine())


def _quiet() -> None:
    from luffy.console import quiet_libraries
    from luffy.process import before_torch

    before_torch()
    quiet_libraries()


def _spell_out_resume(argv: list[str]) -> list[str]:
    """A bare `--resume` means `--resume auto`; argparse would take the recipe that follows it for its value."""
    spelled: list[str] = []
    for word in argv:
        if word == "auto" and spelled[-1:] == ["--resume=auto"]:
            continue
        spelled.append("--resume=auto" if word == "--resume" else word)
    return spelled


def _wants_help(commands: tuple[str, ...]) -> bool:
    return any(flag in sys.argv for flag in ("-h", "--help")) and any(command in sys.argv for command in commands)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {value}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must lie above 0 and be at most 1, got {value}")
    return value


def _gib(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {value}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
