"""How many servers, and how far ahead of the update: a model of the trainer and its rollout servers, event by event.

    python -m bench.async_sim --gpus 64 [--gpu h100] [--model qwen2.5-7b] [--prompts 128] [--rows 8]
                              [--mean 3000] [--spread 0.9] [--longest 8192] [--out FILE.png]
    python -m bench.async_sim --run RUN [--servers 1 2 4] [--ahead 0 1 2]    from what a run has recorded
    python -m bench.async_sim --compare RUN OTHER                            predict OTHER from RUN

The model is `bench.pipeline`. Lengths are drawn from a log-normal distribution cut at the longest answer.

With --gpus rates are computed from data sheets (`luffy.machines`) and the shares of them in `ASSUMED`: nothing was
measured on a GPU. With --run they are fitted to the run's own metrics.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.pipeline import Lengths, Outcome, Rates, Simulation
from luffy.machines import MACHINES
from luffy.shapes import KNOWN, Shape
from luffy.step_time import kv_bytes

STEPS = 16
ASSUMED = {"update": 0.40, "prefill": 0.50, "memory": 0.60, "network": 0.50}
"""Shares of the data sheet's rates: of FLOP/s in an update and of prompts, of memory bandwidth while decoding, of a
link while weights are sent."""


def log_normal(mean: float, spread: float, longest: int) -> Lengths:
    """spread: standard deviation of the logarithm. mean: before what is longer is cut off."""
    mu = math.log(mean) - spread**2 / 2
    return lambda rng: max(1, min(longest, round(math.exp(rng.gauss(mu, spread)))))


# --- rates of GPUs ---


def computed(shape: Shape, gpu: str, *, trainers: int, parallel: int, prompt: int, mean: float, slots: int) -> Rates:
    """Of servers of `parallel` GPUs each and a trainer of `trainers`, by data sheet and `ASSUMED`."""
    machine = MACHINES[gpu]
    memory = ASSUMED["memory"] * machine.bandwidth * parallel
    flops = machine.flops * parallel
    weights = 2 * shape.parameters
    attended = prompt + mean / 2
    return Rates(
        decode=weights / memory,
        sequence=kv_bytes(shape) * attended / memory + 2 * shape.parameters / (ASSUMED["prefill"] * flops),
        prompt=2 * shape.parameters * prompt / (ASSUMED["prefill"] * flops),
        update=28 * shape.parameters / trainers / (ASSUMED["memory"] * machine.bandwidth),
        # forward, backward, and forward again for recomputation; prompts beside answers
        token=8 * shape.parameters * (1 + prompt / max(mean, 1) / 8) / (ASSUMED["update"] * machine.flops * trainers),
        sync=weights / (ASSUMED["network"] * machine.network),
        slots=slots,
    )


def choices(shape: Shape, gpu: str, gpus: int) -> Iterator[tuple[int, int, int]]:
    """(trainers, servers, GPUs of a server) that have room for weights, and for a training state of 18 bytes a
    parameter beside activations."""
    room = MACHINES[gpu].memory
    parallel = 1
    while 2 * shape.parameters > 0.6 * room * parallel:
        parallel *= 2
    parallels = (parallel, 2 * parallel, 4 * parallel)  # more of them: fewer sequences, each faster
    least = math.ceil(18 * shape.parameters / (0.6 * room))
    shares = sorted({max(1, round(gpus * share / 16)) for share in range(1, 16)})
    for trainers, many in itertools.product(shares, parallels):
        servers = (gpus - trainers) // many
        if trainers >= least and servers >= 1 and many <= 8:
            yield gpus - servers * many, servers, many


# --- rates of a run ---


def read(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def fitted(run: Path) -> tuple[Rates, Lengths, dict[str, Any]]:
    """Of a run that was not ahead: medians of its steps but the first."""
    import tomllib

    config = tomllib.loads((run / "config.toml").read_text())
    steps = read(run)[1:]
    names = ("rollout", "sync", "update", "verify")
    mid = {name: statistics.median(step[f"timing_s/{name}"] for step in steps) for name in names}
    mean = statistics.fmean(step["on_off_metrics/on_response_length_mean"] for step in steps)
    longest = max(step["response_length/max"] for step in steps)
    rates = Rates(
        decode=mid["rollout"] / longest, sequence=0.0, prompt=0.0, update=mid["update"], token=0.0, sync=mid["sync"],
        verify=mid["verify"], slots=10**6,
    )  # fmt: skip
    spread = max(0.05, math.log(max(longest / mean, 1.01)) / 2)
    return rates, log_normal(mean, spread, round(longest)), config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8])
    parser.add_argument("--gpu", default="h100", choices=sorted(MACHINES))
    parser.add_argument("--model", default="qwen2.5-7b", choices=sorted(KNOWN))
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=200, help="tokens of a prompt")
    parser.add_argument("--mean", type=float, default=3000, help="tokens of an answer")
    parser.add_argument("--spread", type=float, default=0.9, help="standard deviation of their logarithm")
    parser.add_argument("--longest", type=int, default=8192)
    parser.add_argument("--slots", type=int, default=256, help="sequences that a server decodes at a time")
    parser.add_argument("--oversample", type=float, default=1.0, help="prompts begun, as a multiple of those needed")
    parser.add_argument("--ahead", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("RUN", "OTHER"))
    parser.add_argument("--out", type=Path, help="a picture of the best choice's timeline")
    args = parser.parse_args()
    if args.compare:
        compare(*args.compare)
    elif args.run:
        from_run(args.run, args.servers, args.ahead)
    else:
        for gpus in args.gpus:
            plan(args, gpus)


def plan(args: argparse.Namespace, gpus: int) -> None:
    shape, lengths = KNOWN[args.model], log_normal(args.mean, args.spread, args.longest)
    drawn = random.Random(1)
    mean = statistics.fmean(lengths(drawn) for _ in range(2000))
    print(
        f"\n{args.model}, {gpus} x {args.gpu}: {args.prompts} prompts x {args.rows} answers of {mean:.0f} tokens "
        f"(longest {args.longest}); computed, not measured"
    )
    print("ahead  trainers  servers  s/step  trainer busy  servers busy  staleness  tokens/s/GPU")
    best: dict[int, tuple[float, Outcome, tuple[int, int, int]]] = {}
    for ahead in args.ahead:
        for least, choice, rates in sorted(bounded(args, shape, gpus, mean, ahead), key=lambda found: found[0]):
            if ahead in best and least >= best[ahead][0]:
                break  # nor is any other better
            found = Simulation(
                rates,
                lengths,
                servers=choice[1],
                ahead=ahead,
                prompts=args.prompts,
                rows=args.rows,
                oversample=args.oversample,
            ).run(STEPS)
            if ahead not in best or found.seconds < best[ahead][0]:
                best[ahead] = found.seconds, found, choice
        if ahead not in best:
            print(f"{ahead:5}  nothing fits: {shape.parameters / 1e9:.0f}e9 parameters need more GPUs of {args.gpu}")
            continue
        _, found, (trainers, servers, parallel) = best[ahead]
        many = f"{servers}x{parallel}" if parallel > 1 else str(servers)
        rate = args.prompts * args.rows * mean / found.seconds / gpus
        print(
            f"{ahead:5}  {trainers:8}  {many:>7}  {found.seconds:6.1f}  {found.trainer:12.0%}  {found.servers:12.0%}"
            f"  {found.staleness:9.2f}  {rate:12.0f}"
        )
    if args.out and best:
        draw(args.out, {f"ahead {ahead}": found for ahead, (_, found, _) in best.items()}, f"{args.model}, {gpus} GPUs")
        print(f"picture: {args.out}")


def bounded(
    args: argparse.Namespace, shape: Shape, gpus: int, mean: float, ahead: int
) -> Iterator[tuple[float, tuple[int, int, int], Rates]]:
    """(seconds that no step can take less than, choice, its rates): servers always full, nothing waited for."""
    tokens = args.prompts * args.rows * mean
    for trainers, servers, parallel in choices(shape, args.gpu, gpus):
        kv = (0.9 * MACHINES[args.gpu].memory * parallel - 2 * shape.parameters) / kv_bytes(shape)
        slots = max(args.rows, min(args.slots, int(kv / (args.prompt + mean))))
        rates = computed(
            shape, args.gpu, trainers=trainers, parallel=parallel, prompt=args.prompt, mean=mean, slots=slots
        )
        update = rates.update + rates.token * tokens
        together = min(slots, math.ceil(args.prompts * args.rows / servers))
        rollout = tokens / servers * (rates.decode / together + rates.sequence)
        least = max(update, rollout) if ahead else update + rollout
        yield 0.95 * least, (trainers, servers, parallel), rates  # lengths drawn have another mean


def from_run(run: Path, servers: Sequence[int], aheads: Sequence[int]) -> None:
    rates, lengths, config = fitted(run)
    prompts, rows = config["train"]["prompts_per_step"], config["objective"]["rows"]
    print("ahead  servers  s/step  trainer busy  servers busy  staleness")
    for ahead, count in itertools.product(aheads, servers):
        found = Simulation(rates, lengths, servers=count, ahead=ahead, prompts=prompts, rows=rows).run(STEPS)
        print(
            f"{ahead:5}  {count:7}  {found.seconds:6.2f}  {found.trainer:12.0%}  {found.servers:12.0%}"
            f"  {found.staleness:9.2f}"
        )


def compare(run: Path, other: Path) -> dict[str, tuple[float, float]]:
    """name -> (predicted from `run`, seen in `other`), which has the same settings but for how far it is ahead."""
    import tomllib

    rates, lengths, config = fitted(run)
    theirs = tomllib.loads((other / "config.toml").read_text())["rollout"]
    prompts, rows = config["train"]["prompts_per_step"], config["objective"]["rows"]
    seen = read(other)[2:]
    found = Simulation(
        rates, lengths, servers=theirs["servers"], ahead=theirs["max_staleness"], prompts=prompts, rows=rows
    ).run(max(STEPS, len(seen)))  # fmt: skip
    told = {
        "s/step": (found.seconds, statistics.median(step["timing_s/step"] for step in seen)),
        "staleness": (found.staleness, statistics.fmean(step["rollout/staleness_mean"] for step in seen)),
    }
    for name, (predicted, measured) in told.items():
        print(f"{name:10}  predicted {predicted:6.2f}  seen {measured:6.2f}")
    return told


def draw(path: Path, found: dict[str, Outcome], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(found), 1, figsize=(9, 1.4 * len(found) + 0.8), sharex=True, squeeze=False)
    until = 6 * min(outcome.seconds for outcome in found.values())
    colours = ["#4878a8", "#e0913a", "#6a9f58", "#b85450"]
    for axis, (name, outcome) in zip(axes[:, 0], found.items(), strict=True):
        for what, begin, end, step in outcome.timeline:
            row = 1 if what == "update" else 0
            axis.barh(row, end - begin, left=begin, height=0.8, color=colours[step % 4], edgecolor="white")
        axis.set_yticks([0, 1], ["servers", "trainer"])
        axis.set_title(
            f"{name}: {outcome.seconds:.0f} s a step, trainer {outcome.trainer:.0%} busy", loc="left", size=9
        )
        axis.set_xlim(0, until)
    axes[-1, 0].set_xlabel(f"seconds; a colour is a step. {title}, computed")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
