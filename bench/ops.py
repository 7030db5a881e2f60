"""Times the LM-head losses on this CPU: ours beside plain torch, bare products and every peer that runs here.

    python -m bench.ops --standard                  the set behind README's table, into bench/results/ops-<cpu>.jsonl
    python -m bench.ops --shapes smollm2-135m 896x151936 --tokens 1024 --modes policy logp [--active 1 0.5 0.25]
        [--zero 0 0.75] [--head train frozen] [--dtype bf16 fp32] [--impl ours naive] [--out FILE]

A case is a shape, a number of tokens, a mode (`bench.peers.MODES`), a dtype, the share of rows that count, the share of
sequences with advantage 0, whether the head is trained, and whether the process keeps memory that was freed (as the
trainer does, `luffy.process`) or asks the system for fresh pages in every call (as Python starts).

Contenders (`bench.contenders`) first pass a gate: their log-probs, or their loss and its gradients, against float64 or
float32 by plain products; who fails it is not timed. Then they take turns, on buffers that alternate, with torch's
threads fixed. A row of the JSON lines holds median, 20th and 80th percentile in ms, the errors, and the memory beyond
inputs and gradients, measured in a process of its own. `ours_ignored` and `ours_zero` are ours on the same case with
3/4 of the rows ignored, or of the sequences at advantage 0: turns with `ours` give their ratio.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import contenders, roofline
from bench.contenders import Call, Problem
from bench.gpu_check import error, gradients, spread, step, timed
from bench.machine import RESULTS, ROOT, Record, file_name, machine
from bench.memory import forget_peak, resident
from bench.peers import CE, ENTROPY, LOGP, MODES, POLICY
from luffy.process import keep_freed_memory
from luffy.run_folder import cpu_name

CHOICES = ("shapes", "tokens", "modes", "dtype", "active", "zero", "head", "fresh", "impl")  # of the command line
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SEQUENCE = 128
SECONDS, ROUNDS = 8.0, (3, 7)  # of the timed rounds of a case's slowest contender, at most
# Gates, of what is plainly wrong rather than rounded: bf16 logits are off by some 0.01 nats, 3 % of a gradient.
LOGP_GATE, LOSS_GATE, GRAD_GATE = 0.1, 0.05, 0.1
OURS_GATE = {"logp_error": 1e-4, "loss_error": 1e-3, "grad_error": 0.02}
PRODUCTS = ("gemm_x1", "gemm_x3", "gemm_x4", "tiles_x1", "tiles_x3")
VOCABULARIES, TOKENS = (8192, 32768, 131072), (512, 8192, 16384)  # of the plot, beside the main shapes
TIME, MEMORY, BOTH = "time", "memory", "time and memory"
SHARES = {"ours_ignored": {"active": 0.25}, "ours_zero": {"zero": 0.75}}
CPU_SKIPS = ("verl_triton", "quack")  # device kernels
HEADER = (
    f"{'implementation':16s} {'median ms':>10s}{'p20':>10s}{'p80':>10s} {'extra MiB':>9s} {'error':>9s} {'dx, dW':>9s}"
)


@dataclass(frozen=True)
class Case:
    shape: str
    tokens: int
    mode: str = POLICY
    dtype: str = "bf16"
    active: float = 1.0
    zero: float = 0.0
    frozen: bool = False
    kept: bool = True

    def problem(self, seed: int = 0) -> Problem:
        hidden, vocabulary = roofline.shape_of("--shapes", self.shape)
        torch.manual_seed(seed)
        options = {"dtype": DTYPES[self.dtype], "active": self.active, "zero": self.zero, "seed": seed}
        p = contenders.make_problem(hidden, vocabulary, self.tokens, "cpu", SEQUENCE, **options)
        p.weight.requires_grad_(not self.frozen)
        return p


def standard() -> Iterator[tuple[Case, list[str], str]]:
    """(case, its contenders, what is measured): what README shows, in 15 minutes on two cores."""
    small, large = ("smollm2-135m", 2048), ("qwen2.5-0.5b", 1024)
    policy = ["ours", "gemm_x3", "tiles_x3", "naive", "liger_grpo", "trl_logp"]
    logp = ["ours", "gemm_x1", "tiles_x1", "naive", "naive_bf16", "trl_logp", "naive_wide"]
    for shape in (small, large):  # first: what is kept is never given back
        yield Case(*shape, kept=False), policy, TIME
        yield Case(*shape, mode=LOGP, kept=False), logp[:4], TIME
    yield Case(*small), [*policy, *SHARES, "naive_bf16", "naive_compiled"], BOTH
    yield Case(*large), [*policy, *SHARES], TIME
    yield Case(*large), ["ours", "naive"], MEMORY
    yield Case(*small, mode=LOGP), [*logp, "naive_compiled", "torch_lce"], TIME
    yield Case(*large, mode=LOGP), logp, TIME
    for shape in (small, large):
        yield Case(*shape, dtype="fp32"), policy[:4], TIME
    for share in ({"active": 0.5}, {"frozen": True}):
        yield Case(*small, **share), ["ours", "naive"], TIME
    half = ("smollm2-135m", 1024)
    yield Case(*half, mode=CE), ["ours", "naive", "liger_flce", "cce", "torch_lce"], TIME
    yield Case(*half, mode=ENTROPY), ["ours", "naive", "trl_logp"], TIME
    for vocabulary in VOCABULARIES:
        yield Case(f"576x{vocabulary}", 512), ["ours", "gemm_x3", "naive", "liger_grpo", "trl_logp"], TIME
    for tokens in TOKENS:
        yield Case("smollm2-135m", tokens), ["ours", "naive"] if tokens < 2048 else ["ours"], MEMORY


@functools.cache
def tiled_products() -> Any:
    """Products by tiles, compiled on first use: what no softmax at all would cost."""
    from torch.utils.cpp_extension import load

    source = str(ROOT / "bench" / "tiled_products.cpp")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where ninja is
    load("luffy_bench", [source], extra_cflags=["-O3", "-fopenmp"], is_python_module=False, verbose=False)
    return torch.ops.luffy_bench.tiled_products


def tiles(count: int) -> Call:
    product, rows = tiled_products(), {}

    def call(p: Problem) -> None:
        shape = p.weight.shape
        if shape not in rows:
            rows[shape] = torch.empty(shape if count > 1 else (0,))
        dw = rows[shape]
        narrow = p.weight.dtype == torch.bfloat16 and torch.ops.luffy_kernels.bf16_words(p.weight)
        product(len(p.targets), shape[1], shape[0], dw, count, narrow)

    return call


def load(impl: str, mode: str) -> Call:
    return tiles(int(impl[-1])) if impl.startswith("tiles") else contenders.load(project(impl), mode)


def project(impl: str) -> str:
    """Whose call it is: ours on other shares of the rows is ours."""
    return "ours" if impl in SHARES else impl


def names(mode: str) -> list[str]:
    listed = [impl for impl in contenders.names(mode) if impl not in CPU_SKIPS]
    listed += {LOGP: ["tiles_x1"], CE: ["tiles_x3"], POLICY: ["tiles_x3", *SHARES]}.get(mode, [])
    return listed


def exact_gradients(p: Problem, mode: str) -> list[torch.Tensor]:
    """By plain float32 products and autograd, from the same operands."""
    wide = p._replace(
        hidden=p.hidden.detach().float().requires_grad_(),
        weight=p.weight.detach().float().requires_grad_(p.weight.requires_grad),
    )
    return list(gradients(contenders.load("naive", mode)(wide), wide, mode))


def check(impl: str, call: Call, p: Problem, mode: str, exact: list[torch.Tensor]) -> Record:
    """Errors of a contender. ValueError where one is beyond its gate."""
    if impl in PRODUCTS:
        return {}
    if mode == LOGP:
        found = error(step(call, p, mode), p, mode)
    else:
        out = call(p)
        grads, found = gradients(out, p, mode), error(out, p, mode)
        tiny = torch.finfo(torch.float32).tiny  # every advantage may be 0
        off = [(g.float() - w).abs().max() / w.abs().max().clamp(min=tiny) for g, w in zip(grads, exact, strict=True)]
        found["grad_error"] = float(torch.stack(off).max())  # NaN if any of them is
    gates = {"logp_error": LOGP_GATE, "loss_error": LOSS_GATE, "grad_error": GRAD_GATE}
    for name, value in found.items():
        gate = (OURS_GATE if project(impl) == "ours" else gates)[name]
        if not value <= gate:
            raise ValueError(f"not timed: its {name.replace('_', ' ')} is {value:.1e}, more than {gate:g}")
    return found


def measure(case: Case, impls: list[str], what: str, threads: int | None = None) -> Iterator[Record]:
    """A record per contender: its figures, or "why" there are none."""
    if what == MEMORY:
        yield from ({"impl": impl, "extra_mib": peak_memory(case, impl, threads)} for impl in impls)
        return
    mode, ready = case.mode, {}
    times: dict[str, list[float]] = {}
    problems: dict[str, list[Problem]] = {}
    exact: dict[str, list[torch.Tensor]] = {}
    for impl in impls:
        kind = impl if impl in SHARES else ""
        if kind not in problems:
            problems[kind] = [replace(case, **SHARES.get(kind, {})).problem(seed) for seed in (0, 1)]
            exact[kind] = [] if mode == LOGP else exact_gradients(problems[kind][0], mode)
        p = problems[kind][0]
        try:
            call = load(impl, mode)
            found = check(impl, call, p, mode, exact[kind])
            times[impl] = [timed(call, p, mode)]
            ready[impl] = call, problems[kind], found
        except Exception as failure:  # a peer may raise anything; the others go on
            yield {"impl": impl, "why": contenders.why(failure)}
    del exact
    slowest = max((first for [first] in times.values()), default=1.0) / 1e3
    for i in range(1, max(ROUNDS[0], min(ROUNDS[1], int(SECONDS / slowest)))):
        for impl, (call, both, _) in ready.items():
            times[impl].append(timed(call, both[i % 2], mode))
    found_by = {impl: found for impl, (_, _, found) in ready.items()}
    del problems, p, ready  # before other processes need the memory
    for impl, ms in times.items():
        wanted = what == BOTH and impl not in PRODUCTS
        peak = {"extra_mib": peak_memory(case, impl, threads)} if wanted else {}
        yield {"impl": impl, **found_by[impl], **spread(ms), **peak}


def peak_memory(case: Case, impl: str, threads: int | None = None) -> float | None:
    """MiB beyond inputs and gradients in a fresh process; of ours, whose figure is small, the median of three."""
    case = replace(case, **SHARES.get(impl, {}))
    command = [sys.executable, "-m", "bench.ops", "--memory", json.dumps(asdict(case)), "--impl", impl]
    command += [] if threads is None else ["--threads", str(threads)]
    found = []
    for _ in range(3 if project(impl) == "ours" else 1):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason"])[-1]
            print(f"{impl}: no memory figure: {reason}", file=sys.stderr)
            return None
        found.append(float(done.stdout.split()[-1]))
    return statistics.median(found)


def measure_memory(case: Case, impl: str) -> float:
    """Largest resident set during one step less that before it and less the gradients. Linux alone can be asked."""
    call, small = load(impl, case.mode), Case("576x4096", SEQUENCE, case.mode, case.dtype)
    timed(call, small.problem(), case.mode)  # libraries and thread pools are not what is measured
    p = case.problem()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # nor is what the first step left behind
    forget_peak()
    before = resident("VmRSS")
    if case.mode == LOGP:
        step(call, p, case.mode)
        kept = 0
    else:
        kept = sum(g.nbytes for g in gradients(call(p), p, case.mode))
    return (resident("VmHWM") - before - kept) / 2**20


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--standard", action="store_true", help="the set behind README's table")
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m"], help=f"HxV or of {', '.join(roofline.SHAPES)}")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048], metavar="N")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=[POLICY])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--active", nargs="+", type=float, default=[1.0], help="share of rows that count")
    parser.add_argument("--zero", nargs="+", type=float, default=[0.0], help="share of sequences with advantage 0")
    parser.add_argument("--head", nargs="+", choices=("train", "frozen"), default=["train"])
    parser.add_argument("--fresh", action="store_true", help="fresh pages in every call, as Python starts")
    parser.add_argument("--impl", nargs="+", help="contenders; all by default")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--threads", type=int, help="torch's threads; as many as it takes by default")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines; by default only the table is printed")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # a case: print its contender's memory, nothing else
    args = parser.parse_args(argv)
    try:
        [roofline.shape_of("--shapes", name) for name in args.shapes]
        for tokens in args.tokens:
            roofline.expect(tokens > 0 and tokens % SEQUENCE == 0, "--tokens", f"a multiple of {SEQUENCE}", tokens)
        for share in args.active:
            roofline.expect(0 < share <= 1, "--active", "in (0, 1]", share)
        for share in args.zero:
            roofline.expect(0 <= share <= 1, "--zero", "in [0, 1]", share)
            for tokens in args.tokens:
                sequences = share * tokens / SEQUENCE
                roofline.expect(sequences.is_integer(), "--zero", f"of whole sequences of {SEQUENCE} tokens", share)
        roofline.expect(args.threads is None or args.threads > 0, "--threads", "positive", args.threads)
        chosen = [name for name in CHOICES if getattr(args, name) != parser.get_default(name)]
        roofline.expect(not args.standard or not chosen, "--standard", "without " + ", ".join(CHOICES), chosen)
        folder = args.out.parent if args.out else RESULTS
        roofline.expect(folder.is_dir(), "--out", "in a folder that exists", args.out)
        known = sorted({impl for mode in args.modes for impl in names(mode)})
        for impl in args.impl or []:
            roofline.expect(impl in known, "--impl", f"of {', '.join(known)}", impl)
    except roofline.InputError as failure:
        parser.error(str(failure))
    return args


def cases(args: argparse.Namespace) -> Iterator[tuple[Case, list[str], str]]:
    if args.standard:
        yield from standard()
        return
    for shape, tokens, mode, dtype, active, zero, head in itertools.product(
        args.shapes, args.tokens, args.modes, args.dtype, args.active, args.zero, args.head
    ):
        case = Case(shape, tokens, mode, dtype, active, zero, head == "frozen", not args.fresh)
        listed = names(mode)
        yield case, [impl for impl in args.impl or listed if impl in listed], TIME if args.no_memory else BOTH


def title(case: Case) -> str:
    shares = f"{case.active:g} active, {case.zero:g} at advantage 0, head {'frozen' if case.frozen else 'trained'}"
    memory = "" if case.kept else ", fresh memory"
    return f"{case.shape}, {case.tokens} tokens, {MODES[case.mode]}, {case.dtype}, {shares}{memory}"


def line(record: Record) -> str:
    if "why" in record:
        return f"{record['impl']:16s} {record['why']}"
    times = (record.get(name) for name in ("ms", "p20_ms", "p80_ms"))
    cells = "".join(f"{'-' if x is None else f'{x:.1f}':>10s}" for x in times)
    extra, off = record.get("extra_mib"), record.get("logp_error", record.get("loss_error"))
    grad = record.get("grad_error")
    marks = [f"{'-' if x is None else form.format(x):>9s}" for x, form in ((extra, "{:.0f}"), (off, "{:.1e}"))]
    return f"{record['impl']:16s} {cells} {marks[0]} {marks[1]} {'-' if grad is None else f'{grad:.1e}':>9s}"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory:
        print(measure_memory(Case(**json.loads(args.memory)), args.impl[0]))
        return 0
    out = args.out
    if out is None and args.standard:
        out = RESULTS / file_name("ops", cpu_name(), "jsonl")
    lines = [json.dumps({"machine": machine()})]
    partial = None if out is None else out.with_suffix(".partial")
    try:
        for case, impls, what in cases(args):
            if case.kept:
                keep_freed_memory()
            print(f"\n{title(case)}")
            print(HEADER)
            for record in measure(case, impls, what, args.threads):
                print(line(record), flush=True)
                lines.append(json.dumps(asdict(case) | record))
                if partial is not None:
                    partial.write_text("\n".join(lines) + "\n")
    except KeyboardInterrupt:
        print("\nluffy: stopped.", file=sys.stderr)
        return 130
    if partial is not None and out is not None:
        partial.replace(out)
        print(f"\nwritten to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
