"""Times the LM-head losses on the device at hand, ours beside plain torch, bare GEMMs and what peers are installed.

    python -m bench.gpu_check --out FILE [--shapes llama3-8b ...] [--tokens 8192 ...] [--minutes 10]
    python -m bench.gpu_check --out FILE --tiny     on CPU too: tries the logic on toy shapes and says nothing of speed

A group is a shape, a number of tokens and a mode (`bench.peers.MODES`). Its contenders (`bench.contenders`) are warmed
up one after the other, then take turns, so that a clock that falls falls for all. Per contender: median, 20th and 80th
percentile of a call in ms (CUDA events), its peak memory beside hidden and weight, and its error: of log-probs against
float64 on a sample of rows, of a scalar loss against float32 of all rows. Measurements that would exceed the minutes
are not started. What was not installed, failed or was left out is listed with its reason.

FILE holds the JSON that `python -m bench.roofline --measured` reads ("results"), the contenders that it does not know
("unmodelled"), the environment, what was skipped, and the correctness tests of --junit. A folder as FILE gets a file
named after the device. Written whole after every group: an interrupted run keeps what it had.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from bench import contenders, roofline
from bench.contenders import Call, Problem
from bench.machine import Record, environment, file_name
from bench.peers import CE, ENTROPY, LOGP, MODES, POLICY, find
from luffy.files import write_json

SHAPES = ("llama3-8b", "qwen2.5-7b", "qwen3-0.6b")
TINY = {"shapes": ["32x509"], "tokens": [32], "minutes": 1.0}
WARMUPS, ROUNDS, SAMPLE = 3, 20, 64
Clock = Callable[[], float]


class Budget:
    """Seconds that are left, less what is already planned."""

    def __init__(self, seconds: float, clock: Clock = time.perf_counter) -> None:
        self.clock, self.end, self.planned = clock, clock() + seconds, 0.0

    def allows(self, seconds: float = 0.0) -> bool:
        return self.clock() + self.planned + seconds < self.end


def device_name(where: str) -> str:
    return torch.cuda.get_device_name() if where == "cuda" else where


def tests(junit: Path | None) -> Record | None:
    """What the correctness tests said; None where none were asked for."""
    if junit is None:
        return None
    try:
        cases = list(ElementTree.parse(junit).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return {"ran": 0, "failed": ["no results: the tests crashed, or took too long"], "skipped": []}

    def with_a(*tags: str) -> list[str]:
        return [str(case.get("name")) for case in cases if any(case.find(tag) is not None for tag in tags)]

    failed = with_a("failure", "error") if cases else ["no results: no test ran"]
    return {"ran": len(cases), "failed": failed, "skipped": with_a("skipped")}


def gradients(out: Any, p: Problem, mode: str) -> tuple[torch.Tensor, ...]:
    """Of hidden and, unless the head is frozen, weight."""
    scalar = (out[0] * p.upstream[0]).sum() + (out[1] * p.upstream[1]).sum() if mode == ENTROPY else out
    return torch.autograd.grad(scalar, [x for x in (p.hidden, p.weight) if x.requires_grad])


def step(call: Call, p: Problem, mode: str) -> Any:
    """One call as training makes it: forward, and in all modes but `logp` the gradients."""
    if mode == LOGP:
        with torch.no_grad():
            return call(p)
    out = call(p)
    if out is not None:  # a bare GEMM has nothing to differentiate
        gradients(out, p, mode)
    return out


def timed(call: Call, p: Problem, mode: str) -> float:
    """Milliseconds of one step on its device."""
    if p.hidden.device.type == "cpu":
        began = time.perf_counter()
        step(call, p, mode)
        return 1e3 * (time.perf_counter() - began)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step(call, p, mode)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def warm_up(call: Call, p: Problem, mode: str) -> Record:
    """What does not vary between rounds: error and peak memory, and the ms of a call for the plan."""
    for _ in range(WARMUPS - 1):
        out = step(call, p, mode)
    found = {} if out is None else error(out, p, mode)
    del out
    on_device = p.hidden.device.type == "cuda"
    if on_device:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    found["ms"] = timed(call, p, mode)
    if on_device:
        found["peak_mib"] = max(1, torch.cuda.max_memory_allocated() - before) / 2**20
    return found


def error(out: Any, p: Problem, mode: str) -> Record:
    if mode in (CE, POLICY):
        return {"loss_error": abs(float(out.detach()) - contenders.exact_loss(p, mode))}
    logp = out if mode == LOGP else out[0]
    counting = torch.arange(len(p.targets), device=logp.device) if p.active is None else p.active.nonzero()[:, 0]
    rows = counting[torch.linspace(0, len(counting) - 1, SAMPLE, device=logp.device).long()]
    exact = contenders.exact_logp(p.hidden[rows], p.weight, p.targets[rows], torch.float64)
    return {"logp_error": float((logp.detach()[rows].double() - exact).abs().max())}


def measure_group(p: Problem, mode: str, budget: Budget) -> Iterator[Record]:
    """A record per contender: its figures, or "why" there are none."""
    ready: dict[str, tuple[Call, Record]] = {}
    for impl in contenders.names(mode):
        if not budget.allows():
            yield {"impl": impl, "why": "no time left"}
            continue
        try:
            call = contenders.load(impl, mode)
            found = warm_up(call, p, mode)
        except Exception as failure:  # a peer may raise anything; the others go on
            yield {"impl": impl, "why": contenders.why(failure)}
            release(p)
            continue
        seconds = ROUNDS * found["ms"] / 1e3
        if not budget.allows(seconds):
            yield {"impl": impl, "why": f"no time left for {ROUNDS} rounds of {found['ms']:.0f} ms"}
            continue
        budget.planned += seconds
        ready[impl] = call, found
    yield from _rounds(ready, p, mode)
    budget.planned = 0.0


def _rounds(ready: dict[str, tuple[Call, Record]], p: Problem, mode: str) -> Iterator[Record]:
    times: dict[str, list[float]] = {impl: [] for impl in ready}
    for _ in range(ROUNDS):
        for impl in list(times):
            try:
                times[impl].append(timed(ready[impl][0], p, mode))
            except Exception as failure:
                yield {"impl": impl, "why": f"after {len(times.pop(impl))} rounds: {contenders.why(failure)}"}
    for impl, ms in times.items():
        yield {"impl": impl, **ready[impl][1], **spread(ms)}


def spread(ms: list[float]) -> Record:
    cuts = statistics.quantiles(ms, n=5, method="inclusive")
    return {"ms": statistics.median(ms), "p20_ms": cuts[0], "p80_ms": cuts[3], "rounds": len(ms)}


def release(p: Problem) -> None:
    """After a failure: the memory of others, not the time of an allocator that has to ask the driver."""
    if p.hidden.device.type == "cuda":
        torch.cuda.empty_cache()


def modelled(impl: str, mode: str, device: str) -> bool:
    """Whether `bench.roofline` has this contender on this GPU; on one that it does not know, whether at all."""
    algorithm = find(impl, mode)
    known = [name for name, gpu in roofline.GPUS.items() if re.search(gpu.device, device)]
    return algorithm is not None and all(name in algorithm.gpus for name in known)


def run(args: argparse.Namespace, report: Record, save: Callable[[], None], budget: Budget) -> None:
    """Fills the report group by group, and prints each."""
    for name, tokens in itertools.product(args.shapes, args.tokens):
        hidden, vocabulary = roofline.shape_of("--shapes", name)
        about = {"shape": name, "H": hidden, "V": vocabulary, "tokens": tokens}
        try:
            p = contenders.make_problem(hidden, vocabulary, tokens, report["where"]) if budget.allows() else None
            why = "no time left"
        except torch.OutOfMemoryError as failure:
            p, why = None, contenders.why(failure)
        for mode in args.modes:
            group = about | {"mode": mode}
            records = [{"impl": "all", "why": why}] if p is None else list(measure_group(p, mode, budget))
            for record in (group | record for record in records):
                listed = modelled(record["impl"], mode, report["device"])
                report["skipped" if "why" in record else "results" if listed else "unmodelled"].append(record)
            save()
            print("\n".join(table(group, records, report["device"])), flush=True)
        del p


def table(group: Record, records: list[Record], device: str) -> Iterator[str]:
    yield f"\n{group['shape']} (H {group['H']}, V {group['V']}), N {group['tokens']}, {MODES[group['mode']]}; {device}"
    yield f"{'implementation':16s} {'median ms':>10s} {'p20':>8s} {'p80':>8s} {'peak MiB':>9s} {'error':>9s}"
    for r in sorted(records, key=lambda r: r.get("ms", float("inf"))):
        if "why" in r:
            yield f"{r['impl']:16s} {r['why']}"
            continue
        off, peak = r.get("logp_error", r.get("loss_error")), r.get("peak_mib")
        cells = f"{'-' if peak is None else f'{peak:.0f}':>9s} {'-' if off is None else f'{off:.1e}':>9s}"
        yield f"{r['impl']:16s} {r['ms']:10.2f} {r['p20_ms']:8.2f} {r['p80_ms']:8.2f} {cells}"


def comparison(path: Path) -> Iterator[str]:
    try:
        yield from (f"computed  {line}" for line in list(roofline.compare(path, None, tf32=False)))
    except roofline.InputError as failure:
        yield f"no comparison with the roofline: {failure}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the JSON goes")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help=f"HxV or of {', '.join(roofline.SHAPES)}")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="N", help="default 8192")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE")
    parser.add_argument("--minutes", type=float, help="default 10")
    parser.add_argument("--junit", type=Path, metavar="XML", help="results of the correctness tests, for the report")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, on CPU where there is no GPU")
    args = parser.parse_args(argv)
    defaults = TINY if args.tiny else {"shapes": list(SHAPES), "tokens": [8192], "minutes": 10.0}
    for name, value in defaults.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    try:
        [roofline.shape_of("--shapes", name) for name in args.shapes]
        roofline.expect(min(args.tokens) > 0, "--tokens", "positive", args.tokens)
    except roofline.InputError as failure:
        parser.error(str(failure))
    if not (args.tiny or torch.cuda.is_available()):
        parser.error("no GPU here: torch.cuda.is_available() is False (--tiny tries the logic on CPU)")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    budget = Budget(60 * args.minutes)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    device = device_name(where)
    path = args.out / file_name("gpu_check", device, "json") if args.out.is_dir() else args.out
    report: Record = {"device": device, "where": where, "environment": environment(), "complete": False}
    report |= {"tests": tests(args.junit), "results": [], "unmodelled": [], "skipped": []}

    def save() -> None:
        write_json(path, report)

    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    try:
        run(args, report, save, budget)
        report["complete"] = True
    except KeyboardInterrupt:
        print("\nluffy: stopped; what was measured is kept.", file=sys.stderr)
    finally:
        save()
    print("", *comparison(path), "", f"written to {path}", sep="\n")
    failed = report["tests"]["failed"] if report["tests"] else []
    if failed:
        print("\nCORRECTNESS FAILED:", *failed, sep="\n  ")
    return 130 if not report["complete"] else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
