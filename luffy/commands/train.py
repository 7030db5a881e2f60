"""`luffy train`: a run, the rest of one, or with --dry-run what it would be."""

import argparse
import sys
from typing import Any

from luffy import launch
from luffy.commands.arguments import add_command, add_json, add_quiet, add_source
from luffy.commands.plan import add_machine
from luffy.errors import UserError


def add_train(commands: Any) -> None:
    train = add_command(
        commands,
        "train",
        run_train,
        help="train as a recipe or TOML file says",
        usage="luffy train RECIPE|FILE.toml [options] [--section.key VALUE ...]",
        description="Train as a recipe or TOML file says. Any key can be overridden: --optim.lr 2e-5",
        examples=(
            "luffy train quickstart",
            "luffy train quickstart --dry-run  # what it would do, and nothing done",
            "luffy train gsm8k-smoke --data.path gsm8k_train.jsonl --optim.lr 1e-5 --run-dir runs/mine",
            "luffy train luffy-qwen2.5-math-7b --data.path data/openr1 --nproc-per-node 8 --resume",
        ),
        more=keys_help() if _wants_help("train") else "",
    )
    train.set_defaults(keys=True)
    add_source(train)
    train.add_argument("--run-dir", metavar="DIR", help="run folder (default: runs/NAME of the recipe)")
    train.add_argument(
        "--resume",
        choices=("auto",),
        metavar="[auto]",
        help="continue the run in the folder, or start it if there is none; print it again if complete",
    )
    train.add_argument(
        "--dry-run", action="store_true", help="say what the run would be, from the data on, and do nothing"
    )
    add_machine(train, "the ranks that are started", "what is here")
    add_quiet(train)
    add_json(train)
    launch.add_options(train)


def run_train(args: argparse.Namespace, overrides: list[str]) -> int:
    from luffy import rank, stages
    from luffy.config_file import load_stages
    from luffy.run_folder import RunFolder

    rank.become_rank()
    job = launch.parse(args)
    configs = load_stages(args.source, overrides)
    whole = RunFolder(args.run_dir or f"runs/{configs[-1].name}")
    resume = args.resume is not None or rank.restarted()
    if args.dry_run:
        return say_plan(args, overrides, whole, job)
    if args.gpu is not None or args.gpus is not None:
        raise UserError("train: --gpu and --gpus say for what --dry-run plans; ranks are started by --nproc-per-node")
    run, config = stages.due(whole, configs, resume)
    run.check(config, resume)  # before anything slow
    complete = resume and run.is_complete(config)
    # the folder was checked here: from now on the ranks, and those that a restart starts, go on with what is in it
    shown = [f"--{name}" for name in ("quiet", "json") if getattr(args, name)]
    again = ["-m", "luffy", "train", args.source, f"--run-dir={whole.path}", "--resume", *shown, *overrides]
    if job.wanted and not complete:
        return launch.start(job, again)
    from luffy.summary import draw_curves, print_result

    if not complete:
        from luffy.process import prepare_libraries

        prepare_libraries()
        from luffy.train import train

        result = train(config, run, resume)
    if rank.speaks():
        if not (complete and run.curves.is_file()):  # a kill may come between the last step and the picture
            draw_curves(run)
        print_result(run, as_json=args.json)
    if run is not whole:  # `due` gives the first stage while it is not complete
        stages.begin_second(again, result)
    return 0


def say_plan(args: argparse.Namespace, overrides: list[str], whole: Any, job: launch.Launch) -> int:
    from luffy import dry_run, dry_run_text, rank
    from luffy.console import print_json, tell
    from luffy.process import prepare_libraries

    prepare_libraries()
    ranks = args.gpus or (job.ranks_per_node or 0) * job.nodes[1] or None
    found = dry_run.plan(args.source, overrides, whole, args.resume is not None, ranks, args.gpu)
    if rank.speaks():
        if args.json:
            print_json(found)
        else:
            tell("\n".join(dry_run_text.lines(found)))
    return 0


def keys_help() -> str:
    """Every configuration key with its default and meaning."""
    from luffy.config import flat_keys
    from luffy.config_file import recipe_names
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


def spell_out_resume(argv: list[str]) -> list[str]:
    """A bare `--resume` means `--resume auto`; argparse would take the recipe that follows it for its value."""
    spelled: list[str] = []
    for word in argv:
        if word == "auto" and spelled[-1:] == ["--resume=auto"]:
            continue
        spelled.append("--resume=auto" if word == "--resume" else word)
    return spelled


def _wants_help(command: str) -> bool:
    return any(flag in sys.argv for flag in ("-h", "--help")) and command in sys.argv
