"""Where the LM-head losses spend their time on the GPU at hand: by kernel, by chunk size, and by tile.

    python -m bench.gpu_profile [--shape llama3-8b] [--tokens 8192] [--groups 16 1024]

Prints, of random bfloat16 operands: the policy loss with chunks of several sizes (median of 10 calls, peak of one); the
kernels of one call of it, and of log-probs with entropy, both with gradients, by their time; the products alone; and
the candidates that `LUFFY_KERNELS_TUNE=1` would try for the forward of log-probs, with programs in blocks of so many
row tiles. A GPU that is hot runs slower than one that is not: compare within one list.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from luffy_kernels import linear_logprobs, linear_policy_loss, policy_gradient
from torch.profiler import ProfilerActivity, profile

from bench import contenders, roofline
from bench.contenders import Problem

Call = Callable[[], Any]
MIB = 1 << 20
CHUNKS = (512, 1024, 2048, 4096, 8192)  # MiB
ROUNDS, LONGEST = 10, 16


def policy(p: Problem, chunk_bytes: int) -> Any:
    options: dict[str, Any] = {"losses": policy_gradient(0.2, 0.28), "normalizer": float(len(p.targets))}
    options |= {"advantages": p.per_token, "old_logp": p.old_logp, "chunk_bytes": chunk_bytes}
    loss = linear_policy_loss(p.hidden, p.weight, p.labels, **options).loss
    return torch.autograd.grad(loss, (p.hidden, p.weight))


def logprobs(p: Problem) -> Any:
    out = linear_logprobs(p.hidden, p.weight, p.targets, return_entropy=True)
    loss = (out.logp * p.upstream[0]).sum() + (out.entropy * p.upstream[1]).sum()
    return torch.autograd.grad(loss, (p.hidden, p.weight))


def measured(call: Call) -> tuple[float, float]:
    """(median ms, MiB at the peak of a call)."""
    for _ in range(3):
        call()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / MIB


def kernels_of(name: str, call: Call) -> None:
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    events = sorted(seen.key_averages(), key=lambda event: -event.device_time_total)
    print(f"\n{name}: {sum(event.device_time_total for event in events) / 1e3:.1f} ms")
    for event in events[:LONGEST]:
        print(f"  {event.device_time_total / 1e3:8.3f} ms x{event.count:<4d} {event.key[:100]}", flush=True)


def products(p: Problem) -> None:
    h, w = p.hidden.detach(), p.weight.detach()
    dz = torch.randn(len(h), len(w), device=h.device).to(h.dtype)
    dw = torch.zeros(w.shape, device=h.device)
    logits = torch.empty(dz.shape, device=h.device)
    wide: dict[str, Any] = {"out_dtype": torch.float32}
    calls: dict[str, Call] = {
        "h W^T": lambda: torch.mm(h, w.T),
        "h W^T, fp32": lambda: torch.mm(h, w.T, out=logits, **wide),
        "dz W": lambda: torch.mm(dz, w),
        "dz^T h": lambda: torch.mm(dz.T, h),
        "dz^T h, fp32": lambda: torch.mm(dz.T, h, out=dw, **wide),
        "dz^T h, added to fp32": lambda: torch.addmm(dw, dz.T, h, out=dw, **wide),
    }
    print("\nproducts alone")
    for name, call in calls.items():
        print(f"  {measured(call)[0]:8.3f} ms {name}", flush=True)


def tiles(p: Problem, groups: list[int]) -> None:
    from luffy_kernels._triton import search, tuning

    hidden, weight = p.hidden.detach(), p.weight.detach()
    work = 2 * hidden.numel() * len(weight)
    found = []
    for config in search.candidates("logprobs", tuning.arch(hidden.device), 8 * hidden.itemsize):
        for group in groups:
            chosen = config | {"GROUP": group}
            try:
                found.append((search.on_device(search.tiles_launch("logprobs", hidden, weight, chosen)), chosen))
            except Exception as error:  # one that does not fit says so
                print(f"  {chosen}: {str(error).strip().splitlines()[-1][:80]}")
    print("\nforward of log-probs, by tile")
    for ms, config in sorted(found, key=lambda pair: pair[0]):
        print(f"  {ms:8.3f} ms {work / ms / 1e9:4.0f} TFLOP/s {' '.join(f'{k}={v}' for k, v in config.items())}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama3-8b", help=f"HxV or of {', '.join(roofline.SHAPES)}")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--groups", type=int, nargs="+", default=[16], help="row tiles that are in flight together")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no GPU here: torch.cuda.is_available() is False")
    p = contenders.make_problem(*roofline.shape_of("--shape", args.shape), args.tokens, "cuda")
    for mib in CHUNKS:
        ms, peak = measured(lambda mib=mib: policy(p, mib * MIB))
        print(f"policy loss in chunks of {mib} MiB: {ms:.2f} ms, peak {peak:.0f} MiB", flush=True)
    kernels_of("policy loss", lambda: policy(p, 1024 * MIB))
    kernels_of("log-probs and entropy", lambda: logprobs(p))
    products(p)
    tiles(p, args.groups)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
