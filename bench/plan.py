"""What `luffy plan` predicts of an update's memory, and on a GPU of its time, beside what the device at hand takes.

    python -m bench.plan [--case NAME ...] [--out FILE.json]

Each case is a model with random weights and three updates by `luffy.train.update`: from the second on Adam's moments
are in place. A fresh process each, which keeps freed memory as the trainer does. No engine is started. Measured is

    on a CPU   VmHWM, the most memory that the process ever had, less what it had before the model was made and after a
               tiny model had been through the same code: libraries, threads and kernels do not count
    on a GPU   what the process holds of the device at the end (its allocator keeps what it once had, and the driver's
               context counts), what of it was in use at the peak, and the seconds of the third update

Exit code 1 where a prediction of memory is off by more than 15 %. Seconds are compared with the range of the plan, and
decide nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

from bench.memory import resident
from luffy import flops, step_time
from luffy.footprint import GIB, PARTS, Load, Segment, moments, peak
from luffy.machines import Machine, machine_of
from luffy.shapes import Shape, shape_of

TOLERANCE = 0.15
SMOLLM = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
WIDE_HEAD = {
    "model_type": "qwen2", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
NARROW = {
    "model_type": "qwen2", "hidden_size": 448, "intermediate_size": 2432, "num_hidden_layers": 12,
    "num_attention_heads": 7, "num_key_value_heads": 1, "vocab_size": 32768, "tie_word_embeddings": True,
}  # fmt: skip

HELD_OUT = {
    "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10,
    "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


QWEN_1_5B = {
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """An update of `groups` segments, each a prompt and rows of so many tokens, packed to `budget` tokens."""

    name: str
    model: dict[str, Any]
    groups: int
    prompt: int
    rows: tuple[int, ...]
    budget: int
    recompute: Any = False
    entropy: float = 0.0
    lora: int | None = None
    """Rank of adapters."""
    offload: bool = False
    on_cpu: bool = False
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def shape(self) -> Shape:
        return shape_of(self.model, self.name)

    @property
    def segment(self) -> Segment:
        """As `luffy.packing` makes it: the last token of a row stays out of the body."""
        return Segment(self.prompt, tuple(row - 1 for row in self.rows))

    @property
    def load(self) -> Load:
        """The fullest micro-batch."""
        segment = self.segment
        fitting = min(self.groups, self.budget // segment.tokens)
        adapters, ranks = self.shape.adapters(self.lora or 0)
        shared = len(self.rows) * self.prompt / segment.tokens if len(self.rows) > 1 else 0.0
        return Load(
            shape=self.shape,
            adapters=adapters,
            adapter_ranks=ranks,
            tokens=fitting * segment.tokens,
            targets=fitting * sum(self.rows),
            device=self.device,
            recompute=self.recompute,
            offload=self.offload,
            on_cpu=self.on_cpu,
            accumulates=fitting < self.groups,
            segments=(segment,) * fitting if self.device == "cpu" else (),
            copied=shared,
        )

    def seconds(self, gpu: Machine) -> step_time.Range:
        """Of an update, planned."""
        answer = round(sum(self.rows) / len(self.rows))
        work = step_time.Work(
            shape=self.shape, machine=gpu, gpus=1, replicate=1, sequence=1, tokens_per_micro=self.load.tokens,
            recompute=self.recompute, on_cpu=self.on_cpu, prompts=self.groups, rollouts=0, rows=len(self.rows),
            prompt=self.prompt, answer=answer, longest=answer, updates=1, first_pass=False, sequences=1, kv=0.0,
            adapters=self.load.adapters,
        )  # fmt: skip
        return step_time.total(step_time.phases(work))

    def flops(self) -> int:
        """Of an update, recomputation not counted."""
        segment = self.segment
        pairs = self.groups * flops.attended_pairs(self.prompt, list(segment.rows))
        targets, tokens = self.groups * sum(self.rows), self.groups * segment.tokens
        return flops.update_flops(self.shape, tokens, pairs, targets, frozen=bool(self.lora))


CASES = (
    Case("smollm2-135m, 1,536 tokens", SMOLLM, 6, 64, (193,), 1600),
    Case("smollm2-135m, 4,096 tokens recomputed", SMOLLM, 4, 64, (961,), 4200, recompute=True),
    Case("6 blocks, 152k entries, 2 x 2,048 tokens", WIDE_HEAD, 16, 32, (225,), 2100, entropy=0.001),
    Case("12 blocks, 2 x 4,096 tokens, shared prompts", NARROW, 4, 256, (449, 449, 449, 449), 4104),
    # left out when `luffy.footprint.HOLES` was chosen
    Case("held out: 10 blocks, 2 x 1,536 tokens recomputed", HELD_OUT, 4, 96, (673,), 1600, recompute=True),
    Case("held out: smollm2-135m, 2,048 tokens, LoRA of rank 16", SMOLLM, 8, 64, (193,), 2100, lora=16),
)
LONG = (QWEN_1_5B, 2, 512, (1985,) * 8, 16400)
GPU_CASES = tuple(
    dataclasses.replace(case, device="cuda")
    for case in (
        Case("qwen2.5-1.5b, 8,192 tokens", QWEN_1_5B, 4, 256, (993,) * 8, 8200),
        Case("qwen2.5-1.5b, 16,384 tokens, selective", *LONG, recompute="selective"),
        Case("qwen2.5-1.5b, 16,384 tokens recomputed", *LONG, recompute=True, entropy=0.001),
        Case("qwen2.5-1.5b, 16,384 tokens offloaded", *LONG, recompute=True, offload=True),
        Case("qwen2.5-1.5b, one sequence of 32,768 tokens", QWEN_1_5B, 1, 768, (32001,), 33000, recompute=True),
        Case("qwen2.5-1.5b, 16,384 tokens, LoRA of rank 16", *LONG, recompute=True, lora=16),
        Case("qwen2.5-1.5b, 16,384 tokens, optimizer on the CPU", *LONG, recompute=True, on_cpu=True),
    )
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = CASES + GPU_CASES
    parser.add_argument("--case", action="append", choices=[case.name for case in every], help="default: the device's")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # a case: measure it in this very process
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(next(case for case in every if case.name == args.measure))))
        return 0
    chosen = [case for case in every if case.name in args.case] if args.case else GPU_CASES if on_gpu() else CASES
    try:
        results = [compare(case) for case in chosen]
    except KeyboardInterrupt:
        print("\nluffy: stopped", file=sys.stderr)
        return 130
    if args.out:
        from luffy.files import write_json

        write_json(args.out, {"machine": machine(), "results": results})
    off = [result["case"] for result in results if abs(result["error"]) > TOLERANCE]
    print(f"off by more than {TOLERANCE:.0%}: {'; '.join(off)}" if off else f"all within {TOLERANCE:.0%}")
    return 1 if off else 0


def compare(case: Case) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.plan", "--measure", case.name], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"luffy: {case.name} failed: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    measured = found["peak"]
    if found["tokens"] != case.load.tokens:
        raise SystemExit(f"luffy: {case.name}: packed to {found['tokens']} tokens, planned for {case.load.tokens}")
    moment, parts = peak(case.load)
    planned = sum(parts.values())
    error = planned / measured - 1
    print(f"{case.name}: planned {planned / GIB:.2f} GiB ({moment}), measured {measured / GIB:.2f} GiB, {error:+.1%}")
    print("    " + ", ".join(f"{part} {parts[part] / GIB:.2f}" for part in PARTS if parts.get(part)), flush=True)
    every = {name: sum(found.values()) for name, found in moments(case.load).items()}
    result = {"case": case.name, "measured": measured, "planned": planned, "error": error, "moment": moment}
    return result | {"parts": parts, "moments": every} | (timed(case, found) if "seconds" in found else {})


def timed(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """What a GPU took beside what was planned; prints it."""
    print(f"    in use at the peak {found['allocated'] / GIB:.2f} GiB; an update took {found['seconds']:.3f} s", end="")
    about = {"allocated": found["allocated"], "seconds": found["seconds"]}
    if gpu := machine_of(found["device"]):
        low, high = case.seconds(gpu)
        about |= {"planned_s": [low, high], "mfu": flops.mfu(case.flops(), found["seconds"], gpu.flops)}
        print(f" (MFU {about['mfu']:.1%}), planned {low:.3f} to {high:.3f}", end="")
    print(flush=True)
    return about


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def machine() -> dict[str, Any]:
    import torch

    from luffy.run_folder import cpu_name

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu_name(), "gpu": gpu, "threads": torch.get_num_threads(), "torch": torch.__version__}


def measure(case: Case) -> dict[str, Any]:
    """Of this process: {"peak": bytes, "tokens": of the fullest micro-batch}, on a GPU what `timed` reads. Linux."""
    from luffy.process import before_torch, keep_freed_memory

    before_torch()
    keep_freed_memory()
    if case.device == "cuda":
        return measure_on_gpu(case)
    tiny = case.model | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 512}
    tiny |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    run(dataclasses.replace(case, model=tiny, groups=2, prompt=8, rows=(9, 9), budget=64))
    before = resident("VmRSS")
    tokens, _ = run(case)
    return {"peak": resident("VmHWM") - before, "tokens": tokens}


def measure_on_gpu(case: Case) -> dict[str, Any]:
    import torch

    tokens, seconds = run(case)
    free, whole = torch.cuda.mem_get_info()  # of a device that nobody else uses
    return {
        "peak": whole - free,
        "tokens": tokens,
        "seconds": seconds,
        "allocated": torch.cuda.max_memory_allocated(),
        "device": torch.cuda.get_device_name(),
    }


def run(case: Case) -> tuple[int, float]:
    """Three updates by the trainer's own code: tokens of the fullest micro-batch, and seconds of the last update."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from luffy import activations, attention, distributed, lora, optim
    from luffy.config import Config, MeshConfig
    from luffy.model import Policy, shard
    from luffy.objectives import Terms
    from luffy.setup import Trainer
    from luffy.train import micro_batches, update

    torch.manual_seed(0)
    config = Config()
    config.model.gradient_checkpointing = case.recompute
    config.model.offload_activations = case.offload
    config.optim.on_cpu = case.on_cpu
    config.train.tokens_per_micro = case.budget
    sizes = {key: value for key, value in case.model.items() if key != "model_type"}
    with torch.device(case.device):
        lm = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(case.model["model_type"], **sizes), attn_implementation=attention.register()
        ).float()
    if case.lora:
        config.model.lora.rank = case.lora
        lora.adapt(lm, config.model.lora, torch.bfloat16, "random")
    activations.apply(lm, config.model)
    world = distributed.start(MeshConfig())
    policy = shard(Policy(lm, 1.0, case.offload), world.params, torch.bfloat16, case.on_cpu).train()
    trainer = Trainer.bare(config, world, policy, optim.make_optimizer(policy, config.optim))
    loop = {"step": 1, "updates": 0, "bad_in_a_row": 0}
    if case.device == "cuda":  # what making the model took is no part of an update
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        groups = make_groups(case)
        part = Terms(
            groups=groups, rows=[group.rows for group in groups], normalizer=65536.0, entropy_coef=case.entropy
        )
        began = time.perf_counter()
        update(trainer, [part], loop)
        if case.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return max(micro.num_tokens for micro in micro_batches(trainer, part)), seconds


def make_groups(case: Case) -> list[Any]:
    """Advantages are given: none is 0, so all rows enter the model."""
    from luffy.data import Example
    from luffy.data.problem import Problem
    from luffy.groups import Group, Row

    vocabulary = case.model["vocab_size"]
    problem = Problem(id="p", data_source="s", messages=(), answer="1", traces=(), extra={})
    made = []
    for number in range(case.groups):
        prompt = tuple((7 * i + number) % vocabulary for i in range(case.prompt))
        rows = [
            Row(token_ids=tuple((11 * i + 5 * k + number) % vocabulary for i in range(length)), text="", advantage=1.0)
            for k, length in enumerate(case.rows)
        ]
        for row in rows:
            row.sampler_logp = (-1.0,) * len(row.token_ids)
        made.append(Group(example=Example(problem, prompt, ()), rows=rows))
    return made


if __name__ == "__main__":
    raise SystemExit(main())
