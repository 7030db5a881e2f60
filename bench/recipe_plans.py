"""The table of docs/recipes.md: what `luffy plan` says of the recipes on a laptop, one GPU, eight, and many.

python -m bench.recipe_plans    writes it
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from bench.report import ROOT, put
from luffy import plan, plan_text
from luffy.cli import build_parser
from luffy.config_file import load_config
from luffy.machines import GIB, find_machine
from luffy.shapes import find_shape

PAPER = "luffy-qwen2.5-math-7b"
CASES = {
    "a laptop": "quickstart --gpu cpu --model.dtype float32",
    "one GPU of 48 GB, 1.5B": f"{PAPER} --model Qwen/Qwen2.5-1.5B --gpus 1 --gpu l40s --context 4096",
    "one GPU of 80 GB, 1.5B": f"{PAPER} --model Qwen/Qwen2.5-1.5B --gpus 1 --context 8192",
    "one GPU of 80 GB, 7B by LoRA": f"{PAPER} --model Qwen/Qwen2.5-7B --gpus 1 --context 8192 --model.lora.rank 16",
    "8 x H100, the paper's": PAPER,
    "8 x A100, the paper's": f"{PAPER} --gpu a100",
    "32 x H100, 128k tokens": f"{PAPER} --model Qwen/Qwen2.5-7B --gpus 32 --context 131072",
    "64 x H100 beside servers, 72B": f"{PAPER} --model Qwen/Qwen2.5-72B --gpus 64 --context 16384 "
    "--rollout.engine server",
}
"""Title -> what stands behind `luffy plan`."""
SAID = ("--train.tokens_per_micro", "--model.gradient_checkpointing", "--rollout.memory_fraction", "--mesh.sequence",
        "--mesh.replicate", "--optim.on_cpu", "--model.offload_activations", "--model.mlp_tokens")  # fmt: skip


def planned(command: str) -> dict[str, Any]:
    """What `luffy plan COMMAND --json` prints."""
    args, overrides = build_parser().parse_known_args(["plan", *command.split()])
    config, machine = load_config(args.source, overrides), find_machine(args.gpu or "h100")
    gpus = (1 if machine.name == "cpu" else 8) if args.gpus is None else args.gpus
    shape = find_shape(args.model or config.model.name)
    asked = plan.ask(config, shape, machine, gpus, args.context, args.answer_tokens)
    return plan_text.record(asked, *plan.answer(asked))


def table() -> Iterator[str]:
    yield "| where | `luffy plan ...` | fits | GiB a rank | step, s |"
    yield "|---|---|---|---:|---:|"
    for title, command in CASES.items():
        found = planned(command)
        as_it_is = found["configured"]["fits"]
        chosen = found["configured" if as_it_is else "suggested"]
        seconds = [sum(phase[side] for phase in chosen["seconds"].values()) for side in (0, 1)]
        step = f"{seconds[0]:,.0f} - {seconds[1]:,.0f}" if chosen["seconds"] else ""
        fits = "as it is" if as_it_is else f"with {changes(found)}"
        yield f"| {title} | `{command}` | {fits} | {chosen['needed_bytes'] / GIB:.1f} | {step} |"


def changes(found: dict[str, Any]) -> str:
    """Options in which the suggested plan differs from the configured one."""
    before, after = (_options(found[which]["options"]) for which in ("configured", "suggested"))
    return ", ".join(f"`{key[2:]} {after[key]}`" for key in SAID if key in after and after[key] != before.get(key))


def _options(text: str) -> dict[str, str]:
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m bench.recipe_plans", description=__doc__).parse_args(argv)
    put(ROOT / "docs" / "recipes.md", "plans", "\n".join(table()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
