"""Attention of short packed rows on CPU: what `luffy.attention` does, and what it was chosen over.

    python -m bench.attention [--rows 64 --row 60 --prompt 54 --heads 9 --dim 64]

Every variant computes the same thing: `rows` answers of `row` tokens, each attending to its prompt of `prompt` tokens
and to itself. Interleaved, medians of forward and backward in milliseconds.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def per_row(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    pieces = zip(q.split(1), k.split(1), v.split(1), strict=True)
    return torch.cat([scaled_dot_product_attention(*piece, attn_mask=mask) for piece in pieces])


def per_row_fp32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return per_row(q.float(), k.float(), v.float(), mask).to(q.dtype)


def batched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(q.dtype) @ v


VARIANTS = {
    "per row, fp32 (ours)": per_row_fp32,
    "per row, bf16": per_row,
    "batched, bf16": batched,
    "explicit": explicit,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 64), ("row", 60), ("prompt", 54), ("heads", 9), ("dim", 64), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = args.rows, args.heads, args.row, args.dim
    long = args.rows, args.heads, args.prompt + args.row, args.dim
    q, k, v = (torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in (shape, long, long))
    mask = torch.ones(args.row, args.prompt + args.row, dtype=torch.bool).tril(args.prompt)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for _ in range(args.repeats):
        for name, variant in VARIANTS.items():
            began = time.perf_counter()
            out = variant(q, k, v, mask)
            middle = time.perf_counter()
            out.sum().backward()
            times[name].append((middle - began, time.perf_counter() - middle))
    for name, pairs in times.items():
        forward, backward = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:22s} forward {forward:7.1f} ms   backward {backward:7.1f} ms   both {forward + backward:7.1f} ms")


if __name__ == "__main__":
    main()
