"""Chunks by the compiled CPU library: logits never leave the cache, and what is kept of them is exp(z - reference).

    reference   z_y, the target's logit (the maximum where the target is too unlikely for that), [C]
    E           exp(z - reference) of every other entry, [C, V] in csrc/exps.h's layout: bfloat16 or float32
    dz          scale_t E_tv for v != y, so dH and dW are products of E as it lies with scaled operands

A loss with an entropy term, a softcap or label smoothing needs dz itself: it is written over E before the products.
docs/cpu-kernels.md has the schedule and what it costs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._chunks import BLOCK, Gradients, Head, Stats
from ._native import OPS, on_large_pages

# Rows beyond which larger chunks gain nothing: W and dW cross memory once per chunk.
MOST_ROWS, MOST_STATISTICS_ROWS = 1024, 4096
MOST_CAP = 40.0  # softcap / temperature up to which no capped logit is beyond the reach of exp


class Kept(NamedTuple):
    """What the second sweep needs of the first, [C] each."""

    target: Tensor  # the target's logit, less the maximum
    factor: Tensor  # exp(reference - max): E factor is exp(z - max)
    total: Tensor  # sum_v exp(z - reference)
    mean: Tensor  # E_p[z - max]
    p: Tensor  # the target's probability
    rest: Tensor  # 1 - p, without the cancellation


def chunk_rows(head: Head, chunk_bytes: int, keep: bool = True) -> int:
    """Rows of a chunk: chunk_bytes // (bytes of E per row), in whole blocks of 64, at least one and at most 1,024.

    A row of E has V entries of 2 bytes for bfloat16 operands of even width where the CPU multiplies those, else of 4.
    Without a gradient to follow no E is kept, only 16 bytes of statistics per row and tile of the vocabulary, and the
    most is 4,096.
    """
    vocabulary, width = head.weight.shape
    word = 2 if OPS.bf16_words(head.weight) else 4
    most = MOST_ROWS if keep else MOST_STATISTICS_ROWS
    if keep:
        per_row = vocabulary * word
    else:
        _, tiles, *_ = OPS.head_plan(BLOCK, max(1, width), max(1, vocabulary), word, 1)
        per_row = 16 * tiles
    return max(BLOCK, min(most, chunk_bytes // max(1, per_row)) // BLOCK * BLOCK)


class Workspace:
    """The [C, V] buffer of a sweep, made when the first chunk needs it."""

    def __init__(self, rows: int, head: Head) -> None:
        self.weight = head.weight.contiguous()
        self.rows = -(-rows // BLOCK) * BLOCK
        self.exps: Tensor | None = None

    def buffer(self) -> Tensor:
        if self.exps is None:
            ops, vocabulary = OPS, self.weight.shape[0]
            words = bool(ops.bf16_words(self.weight))
            size = self.rows * (vocabulary + vocabulary % 2 if words else vocabulary)
            self.exps = on_large_pages(torch.empty(size, dtype=torch.bfloat16 if words else torch.float32))
        return self.exps


workspace = Workspace


def row_stats(
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    head: Head,
    work: Workspace,
    average: bool = False,
    keep: bool = True,
) -> Stats:
    exps = work.buffer() if keep else None
    bias = None if head.bias is None else head.bias.contiguous()
    options = head.softcap, head.logit_scale, average, exps
    found = OPS.head_sweep(hidden.contiguous(), work.weight, bias, targets, head.temperature[rows], *options)
    reference, target, peak, others, weighted, flat, exps_sum = found  # float64
    top = torch.maximum(peak, target)
    own, shift = (target - top).exp(), peak - top
    others = others * shift.exp()
    total = own + others
    mean = (own * (target - top) + weighted * shift.exp() + others * shift) / total
    logp = target - top - total.log()
    sums = exps_sum + (target - reference).exp(), mean, own / total, others / total
    kept = Kept(*(x.float() for x in (target - top, (reference - top).exp(), *sums)))
    mean_logit = (flat / head.vocabulary - top).float() if average else None
    return Stats(kept, None, top.float(), total.float(), mean.float(), logp.float(), (target - top).float(), mean_logit)


def add_grads(
    stats: Stats,
    rows: Tensor,
    targets: Tensor,
    hidden: Tensor,
    g: Tensor,
    u: Tensor | None,
    lse: Tensor | None,
    head: Head,
    work: Workspace,
    grads: Gradients,
    uniform: Tensor | None = None,
) -> None:
    """Adds this chunk's gradients; arguments as those of `RowKernels.add_grads`."""
    kept, exps, temperature = stats.logits, work.buffer(), head.temperature[rows]
    if u is not None:
        kept = _as_rounded(kept, exps, head.weight.shape[0])
    chain = head.logit_scale / temperature
    on_target = g * kept.rest
    if lse is not None:
        on_target = on_target + kept.p * lse
    if u is not None:
        on_target = on_target - kept.p * u * (kept.target - kept.mean)
    if uniform is not None:
        on_target = on_target + uniform
    on_target = on_target * chain
    flat = -g if lse is None else lse - g
    scale = (flat if u is None else flat + u * kept.mean) * chain / kept.total
    if u is not None or uniform is not None or head.softcap is not None:
        slope = torch.zeros_like(scale) if u is None else -u * chain / kept.total
        share = torch.zeros_like(scale) if uniform is None else uniform * chain
        shape = torch.stack([scale, slope, share, kept.factor, stats.max, temperature])
        OPS.shape_exps_(exps, targets, head.weight.shape[0], shape, head.softcap)
        scale = torch.ones_like(scale)
        if head.softcap is not None:
            tanh = (kept.target + stats.max) * temperature / head.softcap
            on_target = on_target * (1 - tanh.square()).clamp(min=0)  # a masked target lies far beyond the cap
    dh = OPS.head_grads(
        exps,
        hidden.contiguous(),
        work.weight,
        targets,
        scale,
        on_target,
        grads.hidden is not None,
        grads.weight,
        grads.bias,
        grads.fresh,
    )
    if grads.hidden is not None:
        grads.hidden[rows] = dh.to(grads.hidden.dtype)
    grads.fresh = False


def _as_rounded(kept: Kept, exps: Tensor, vocabulary: int) -> Kept:
    """Sum and mean of E as it is stored, rounded. The gradient of the entropy is p (z - mean): for a token that is
    nearly sure the two must cancel, and they do if both are those of the rounded E."""
    others, weighted = OPS.exps_sums(exps, kept.factor, vocabulary)
    own = kept.target.double().exp() / kept.factor
    total = others + own
    mean = (weighted + own * kept.target) / total
    return kept._replace(total=total.float(), mean=mean.float())
