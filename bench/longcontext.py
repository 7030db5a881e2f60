"""Memory of one update against the length of a sequence, by part, and what sequence parallelism leaves of it.

    python -m bench.longcontext [--lengths 1024 ... 65536] [--out bench/results/longcontext.json]

A model of two layers and 50,000 vocabulary entries, one sequence a micro-batch, bfloat16 compute and float32 masters as
the trainer runs. Every figure is the largest resident set of a fresh process during one update, less what it held
before; freed blocks go back to the system at once, so that what is counted is in use. Parts:

    body     the update with a trivial loss in place of the head
    head     the whole update less that
    sp = 2   the body on each of two ranks that share the sequence
    eager    the whole update with fp32 logits of the whole sequence, until it needs more than this machine has

Lines are fitted to the four longest lengths of each column: below, what does not grow (the head's chunk, AdamW) is the
peak of a part alone. Exits 1 where the update does not fit one over all lengths (R^2 < 0.995), or sp = 2 leaves more
than 0.55 of the body's slope.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.memory import forget_peak, resident
from luffy.host import host_memory

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
HIDDEN, LAYERS, VOCABULARY, HEADS = 64, 2, 50_000, 4
EAGER_BYTES = 5 * 4 * VOCABULARY  # a token's: fp32 logits, log-softmax, their gradients, and a copy
# glibc: blocks of 128 KiB and more are the system's own, and the heap is trimmed
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
LINE, SHARE = 0.995, 0.55


def measure(variant: str, length: int) -> float:
    """MiB beyond what was held before, in this process: one of `WORLD_SIZE`."""
    import torch

    from luffy import distributed, optim
    from luffy.config import Config

    torch.manual_seed(0)
    config = Config()
    config.mesh.sequence = int(os.environ.get("WORLD_SIZE", "1"))
    config.objective.entropy_coef = 0.0
    world = distributed.start(config.mesh)
    policy = make_policy(variant, world, max(length, 256))
    optimizer = optim.make_optimizer(policy, config.optim)
    step(policy, optimizer, world, 256)  # libraries, thread pools and Adam's moments are not what is measured
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    step(policy, optimizer, world, length)
    peak = (resident("VmHWM") - before) / 2**20
    [peak] = world.largest([peak])
    distributed.close()
    return peak


def make_policy(variant: str, world: Any, positions: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from luffy import attention
    from luffy.model import Policy, shard

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
    )
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention.register()).float()
    kind = {"update": Policy, "body": body_alone(Policy), "eager": eager(Policy)}[variant]
    return shard(kind(lm, 1.0), world.params, torch.bfloat16).train()


def body_alone(policy: type) -> type:
    class Body(policy):  # type: ignore[misc, valid-type]
        def loss(self, hidden: Any, micro: Any, **_: Any) -> Any:
            return hidden.float().mean()

    return Body


def eager(policy: type) -> type:
    class Eager(policy):  # type: ignore[misc, valid-type]
        def loss(self, hidden: Any, micro: Any, **_: Any) -> Any:
            logits = self.lm.get_output_embeddings()(hidden).float()
            return -logits.log_softmax(-1).gather(-1, micro.targets[:, None]).mean()

    return Eager


def step(policy: Any, optimizer: Any, world: Any, length: int) -> None:
    """One update on one sequence, by the trainer's own parts."""
    import torch
    from luffy_kernels import policy_gradient

    from luffy import optim
    from luffy.data import Example
    from luffy.data.problem import Problem
    from luffy.groups import Group, Row
    from luffy.packing import pack
    from luffy.sequence import slice_of

    tokens = tuple((torch.arange(length + 1) * 7919 % VOCABULARY).tolist())
    problem = Problem(
        id="p", data_source="s", messages=({"role": "user", "content": "?"},), answer="", traces=(), extra={}
    )
    group = Group(example=Example(problem, tokens[:1], ()), rows=[Row(token_ids=tokens[1:], text="", advantage=1.0)])
    [micro] = pack([group], lambda g: g.rows, length + 1)
    micro = slice_of(micro, world.sequence_rank, world.sequence_group)
    out = policy(micro, losses=(policy_gradient(),), normalizer=float(length), entropy_coef=0.0)
    getattr(out, "loss", out).backward()
    optim.step(optimizer, policy, 1.0, 0.0, 1e-6)


def in_processes(variant: str, length: int, ranks: int) -> float:
    """The largest of `ranks` fresh processes."""
    command = [sys.executable, "-m", "bench.longcontext", "--one", variant, str(length)]
    if ranks > 1:
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--local-addr",
            "127.0.0.1",
            f"--nproc-per-node={ranks}",
        ]
        command = [sys.executable, *launcher, *command[1:]]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | GIVE_BACK, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"luffy: {variant} at {length} tokens failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def line(lengths: list[int], values: list[float]) -> tuple[float, float]:
    """(slope in bytes a token, R^2) of a least-squares line."""
    import numpy

    slope, start = numpy.polyfit(lengths, values, 1)
    rest = numpy.asarray(values) - (slope * numpy.asarray(lengths) + start)
    return float(slope) * 2**20, 1 - float((rest**2).sum() / numpy.asarray(values).var() / len(values))


def lines(lengths: list[int], columns: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Of the four longest lengths that a column has."""
    measured = {name: list(zip(lengths, values, strict=False))[-4:] for name, values in columns.items()}
    return {name: line(*map(list, zip(*found, strict=True))) for name, found in measured.items() if len(found) > 2}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.longcontext", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), metavar="N")
    parser.add_argument("--out", type=Path, help="JSON; by default only the table is printed")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a measurement in this process
    args = parser.parse_args(argv)
    if args.one:
        peak = measure(args.one[0], int(args.one[1]))
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(peak), flush=True)
        os._exit(0)  # gloo's threads may outlive the interpreter
    if len(args.lengths) < 3 or min(args.lengths) < 256:
        parser.error(f"--lengths: at least three of at least 256 tokens make a line, got {args.lengths}")
    try:
        return report(args.lengths, args.out)
    except KeyboardInterrupt:
        print("\nluffy: stopped; nothing was written.", file=sys.stderr)
        return 130


def report(lengths: list[int], out: Path | None) -> int:
    columns: dict[str, list[float]] = {name: [] for name in ("update", "body", "head", "body, sp = 2", "eager")}
    print("MiB beyond the model, gradients and optimizer\n" + "tokens".rjust(8) + "".join(f"{c:>14s}" for c in columns))
    for length in lengths:
        columns["update"].append(in_processes("update", length, 1))
        columns["body"].append(in_processes("body", length, 1))
        columns["head"].append(columns["update"][-1] - columns["body"][-1])
        columns["body, sp = 2"].append(in_processes("body", length, 2))
        if EAGER_BYTES * length / 2**20 < 0.8 * host_memory().available / 2**20:
            columns["eager"].append(in_processes("eager", length, 1))
        cells = [
            f"{column[-1]:14.0f}" if len(column) == len(columns["body"]) else f"{'-':>14s}"
            for column in columns.values()
        ]
        print(f"{length:8,d}{''.join(cells)}", flush=True)
    fits = lines(lengths, columns)
    for name, (slope, r2) in fits.items():
        print(f"{name:14s} {slope / 1024:10.2f} KiB a token, R^2 {r2:.4f}")
    share = fits["body, sp = 2"][0] / fits["body"][0]
    times = fits["eager"][0] / fits["update"][0]
    print(f"sp = 2 leaves {share:.2f} of the body's slope; eager takes {times:.0f} times ours")
    if out is not None:
        from bench.machine import machine
        from luffy.files import write_json

        slopes = {name: {"bytes_per_token": slope, "r2": r2} for name, (slope, r2) in fits.items()}
        write_json(out, {"machine": machine(), "lengths": lengths, "mib": columns, "lines": slopes, "share": share})
    straight = line(lengths, columns["update"])[1] >= LINE
    return 0 if straight and share <= SHARE else 1


if __name__ == "__main__":
    raise SystemExit(main())
