"""`luffy plan`."""

import argparse
from typing import Any

from luffy.commands.arguments import add_command, add_json, add_source, positive, whole


def add_plan(commands: Any) -> None:
    plan = add_command(
        commands,
        "plan",
        run_plan,
        help="memory and time of a run, before anything is downloaded",
        usage="luffy plan RECIPE|FILE.toml [options] [--section.key VALUE ...]",
        description="Predict what a run needs on each GPU and what a step takes; suggest a mesh and a budget that fit. "
        "What needs the data too, luffy train --dry-run says.",
        examples=(
            "luffy plan luffy-qwen2.5-math-7b --gpus 8 --gpu h100",
            "luffy plan luffy-qwen2.5-math-7b --model Qwen/Qwen2.5-7B --context 32768 --json",
            "luffy plan quickstart --gpu cpu --train.tokens_per_micro 2048",
        ),
    )
    plan.set_defaults(keys=True)
    add_source(plan)
    plan.add_argument("--model", metavar="MODEL", help="folder, well-known model or Hugging Face id, not the recipe's")
    add_machine(plan, "8; of a cpu 1", "h100")
    plan.add_argument(
        "--context", type=whole, metavar="TOKENS", help="longest prompt and answer (default: the recipe's)"
    )
    plan.add_argument("--answer-tokens", type=whole, metavar="N", help="mean answer (default: half of the longest)")
    add_json(plan)


def add_machine(parser: argparse.ArgumentParser, gpus: str, gpu: str) -> None:
    parser.add_argument("--gpus", type=positive, metavar="N", help=f"GPUs to plan for, a rank each (default: {gpus})")
    parser.add_argument("--gpu", metavar="KIND", help=f"to plan for: h100, a100, ... or cpu (default: {gpu})")


def run_plan(args: argparse.Namespace, overrides: list[str]) -> int:
    from luffy import plan, plan_text
    from luffy.config_file import load_config
    from luffy.machines import find_machine
    from luffy.shapes import find_shape

    config = load_config(args.source, overrides)
    machine = find_machine(args.gpu or "h100")
    shape = find_shape(args.model or config.model.name)
    gpus = (1 if machine.name == "cpu" else 8) if args.gpus is None else args.gpus
    asked = plan.ask(config, shape, machine, gpus, args.context, args.answer_tokens)
    plans = (asked, *plan.answer(asked))
    if args.json:
        from luffy.console import print_json

        print_json(plan_text.record(*plans))
    else:
        print(plan_text.text(*plans))
    return 0
