"""How the CPU kernels' tasks fill many cores: their own plan (csrc/plan.h), scheduled as csrc/tasks.h does.

    python -m bench.schedule [--tokens 1024] [--threads 2 8 64] [--shapes smollm2-135m llama3-8b ...]

Computed, not measured: every product runs at the same rate, a logit costs a fixed time beside it, a parallel region
ends with a barrier, and what is done between regions by one thread counts in full. Memory bandwidth is not modelled:
the table says whether there are enough even pieces of work, not what a socket's memory can feed. A column is the share
of the threads' time spent on work.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import luffy_kernels  # noqa: F401  registers the plan
import torch

from bench import roofline

RATE = 220e9  # FLOP/s of a core: AVX-512 BF16 here; a matrix unit has 5 to 10 times that
LOGIT = 0.9e-9  # seconds of a core per logit beside its product: exponential, sums, rounding
MOVE = 0.15e-9  # seconds per 16-bit word that is transposed or taken apart
BARRIER = 10e-6
COPY = 5e9  # bytes per second of the one thread that packs hidden between regions
WORD, BLOCK, GROUP = 2, 64, 4  # GROUP: kGroup of plan.h
SHAPES = ("smollm2-135m", "qwen2.5-0.5b", "qwen2.5-7b", "llama3-8b", "gemma2-2b")


class Plan(NamedTuple):
    """csrc/plan.h."""

    height: int
    pieces: int
    parts: int
    span: int
    groups: int
    dh_width: int
    dw_height: int
    dw_width: int


def plan(tokens: int, width: int, vocabulary: int, threads: int) -> Plan:
    return Plan(*torch.ops.luffy_kernels.head_plan(tokens, width, vocabulary, WORD, threads))


def cut(total: int, size: int) -> list[int]:
    """Sizes of the pieces of `total`."""
    return [min(size, total - at) for at in range(0, total, size)]


def makespan(costs: Iterable[float], threads: int) -> float:
    """Seconds until the last thread is done when each takes the next task as soon as it is free."""
    free = [0.0] * threads
    for cost in costs:
        heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free)


def regions(tokens: int, width: int, vocabulary: int, threads: int) -> Iterator[list[float]]:
    """Costs of the tasks of each parallel region of a chunk, in their order, in seconds."""
    p, blocks = plan(tokens, width, vocabulary, threads), -(-tokens // BLOCK)
    shares = [blocks * (i + 1) // p.parts - blocks * i // p.parts for i in range(p.parts)]
    logit = 2 * width / RATE + LOGIT
    yield [height * share * BLOCK * logit for height in cut(vocabulary, p.height) for share in shares]
    for span in cut(vocabulary, p.span):
        yield [piece * width * MOVE for piece in cut(span, BLOCK)]
        groups = [BLOCK * size for size in cut(blocks, GROUP)]
        dh = [2 * span * group * part / RATE for group in groups for part in cut(width, p.dh_width)]
        dw = [
            tokens * height * (2 * part / RATE + MOVE)
            for height in cut(span, p.dw_height)
            for part in cut(width, p.dw_width)
        ]
        yield dh + dw


def efficiency(tokens: int, width: int, vocabulary: int, threads: int) -> float:
    """Work of a chunk on one thread over `threads` times its wall time on that many."""
    work = sum(map(sum, regions(tokens, width, vocabulary, 1)))
    serial = 6 * tokens * width * 4 / COPY  # hidden packed, scaled and paired; dH turned, scaled and converted
    wall = serial + sum(makespan(costs, threads) + BARRIER for costs in regions(tokens, width, vocabulary, threads))
    return work / (threads * wall)


def table(tokens: int, shapes: Iterable[str], threads: list[int]) -> Iterator[str]:
    yield f"{'chunk of ' + str(tokens) + ' rows':24s}" + "".join(f"{count:>8d}" for count in threads)
    for name in shapes:
        width, vocabulary = roofline.shape_of("--shapes", name)
        shares = "".join(f"{efficiency(tokens, width, vocabulary, count):8.0%}" for count in threads)
        yield f"{name:24s}{shares}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.schedule", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 8, 16, 32, 64, 128])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    args = parser.parse_args(argv)
    try:
        roofline.expect(min([args.tokens, *args.threads]) > 0, "--tokens, --threads", "positive", args.threads)
        [roofline.shape_of("--shapes", name) for name in args.shapes]
    except roofline.InputError as failure:
        parser.error(str(failure))
    print("\n".join(table(args.tokens, args.shapes, args.threads)))


if __name__ == "__main__":
    main()
