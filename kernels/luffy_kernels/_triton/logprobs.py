"""Log-probs without logits: a GEMM whose tiles end as statistics, and its backward over slices of the vocabulary.

    forward    tiles_kernel   h W^T tile by tile; a tile in registers becomes (max, sum exp, sum exp z, target) per row
               merge_kernel   partials of a row in vocabulary order
    backward   grad_kernel    the same tile again -> dz of a slice; dW of the slice is written once, dh adds up in fp32

A row's result depends on its own tile row alone and on splits that depend on the vocabulary and the architecture, never
on N: it is the same bits in any batch. Partials take 12 bytes per token and `SPLIT` tiles; no logit reaches memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import _gemm, _vocab
from . import tuning
from .device import LOWEST, OUTSIDE, local_target, transform

ALIGNMENT = 16
"""Bytes that a descriptor wants of a matrix's begin and of the step between its rows."""


@triton.jit
def place(tiles, parts, GROUP: tl.constexpr):
    """(row tile, part of the vocabulary) of this program.

    Programs in flight at a time make a block of GROUP row tiles by some parts: what they read of hidden and of the
    weight then stays in the second-level cache. A change of this order changes no bits.
    """
    first = tl.program_id(0) // (GROUP * parts) * GROUP
    within = tl.program_id(0) % (GROUP * parts)
    size = tl.minimum(tiles - first, GROUP)
    return first + within % size, within // size


@triton.jit
def tile(
    hidden,
    weight,
    at,
    token,
    entry,
    vocabulary,
    width,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    OPERAND: tl.constexpr,
    TMA: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] fp32 products of hidden rows and rows of the weight, from these on.

    TMA: hidden, of valid rows alone, and weight are descriptors: the rows `at` on, and `entry` on. Else they are
    pointers: the rows `token` and up to `vocabulary`. WHOLE: the width is a multiple of BLOCK_K.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if TMA:
        for start in range(0, width, BLOCK_K):
            h = hidden.load([at, start])
            w = weight.load([entry, start])
            acc = tl.dot(h.to(OPERAND), w.to(OPERAND).T, acc, input_precision="ieee")
    else:
        k = tl.arange(0, BLOCK_K)
        h_at = hidden + token[:, None] * hidden_row + k[None, :] * hidden_column
        last = tl.minimum(entry + tl.arange(0, BLOCK_N), vocabulary - 1)
        w_at = weight + last.to(tl.int64)[None, :] * weight_row + k[:, None] * weight_column
        for start in range(0, width, BLOCK_K):
            if WHOLE:
                h = tl.load(h_at)
                w = tl.load(w_at)
            else:
                left = width - start
                h = tl.load(h_at, mask=k[None, :] < left, other=0.0)
                w = tl.load(w_at, mask=k[:, None] < left, other=0.0)
            acc = tl.dot(h.to(OPERAND), w.to(OPERAND), acc, input_precision="ieee")
            h_at += BLOCK_K * hidden_column
            w_at += BLOCK_K * weight_column
    return acc


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def quarters(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Four groups of columns, left to right: an epilogue that takes them in turn needs fewer registers at a time."""
    left, right = halves(acc, BLOCK_M, BLOCK_N)
    a, b = halves(left, BLOCK_M, BLOCK_N // 2)
    c, d = halves(right, BLOCK_M, BLOCK_N // 2)
    return a, b, c, d


@triton.jit
def tile_logits(
    acc,
    bias,
    entry,
    vocabulary,
    scale,
    softcap,
    temperature,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """z of a tile and the slope of `transform`; temperature [BLOCK_M]."""
    if BIAS:
        acc += tl.load(bias + tl.minimum(entry, vocabulary - 1))[None, :]  # no mask: it would take registers
    return transform(acc, scale, softcap, temperature[:, None], SOFTCAP)


@triton.jit
def tiles_kernel(
    hidden,
    weight,
    bias,
    rows,
    targets,
    temperature,
    partial,
    found,
    count,
    vocabulary,
    width,
    vocab_start,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    scale,
    softcap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    OPERAND: tl.constexpr,
    TMA: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial [splits, 3, count]: (max, sum, sum of exp times centred z) of SPLIT tiles; found [count]: target's z."""
    splits = tl.maximum(1, tl.cdiv(vocabulary, SPLIT * BLOCK_N))  # a rank without entries has one, of none
    row_tile, split = place(tl.cdiv(count, BLOCK_M), splits, GROUP)
    at = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = at < count
    token = tl.load(rows + at, mask=live, other=0)
    target = local_target(tl.load(targets + token, mask=live, other=-1), vocab_start, vocabulary)
    peak = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_M,), dtype=tl.float32)
    logit = tl.zeros((BLOCK_M,), dtype=tl.float32)
    first = split * SPLIT * BLOCK_N
    for start in range(first, tl.minimum(first + SPLIT * BLOCK_N, vocabulary), BLOCK_N):
        acc = tile(
            hidden,
            weight,
            row_tile * BLOCK_M,
            token,
            start,
            vocabulary,
            width,
            hidden_row,
            hidden_column,
            weight_row,
            weight_column,
            OPERAND,
            TMA,
            WHOLE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        t = tl.load(temperature + token, mask=live, other=1.0)  # here, to be held no longer than it is needed
        parts = quarters(acc, BLOCK_M, BLOCK_N)
        for i in tl.static_range(4):
            entry = start + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            z, _ = tile_logits(parts[i], bias, entry, vocabulary, scale, softcap, t, BIAS, SOFTCAP)
            z = tl.where((entry < vocabulary)[None, :], z, OUTSIDE)
            logit += tl.sum(tl.where(entry[None, :] == target[:, None], z, 0.0), axis=1)
            higher = tl.maximum(peak, tl.max(z, axis=1))
            centred = z - higher[:, None]
            e = tl.exp(centred)
            shift = peak - higher
            weighted = tl.exp(shift) * (weighted + shift * total) + tl.sum(e * centred, axis=1)
            total = tl.exp(shift) * total + tl.sum(e, axis=1)
            peak = higher
    out = partial + split.to(tl.int64) * 3 * count + at
    tl.store(out, peak, mask=live)
    tl.store(out + count, total, mask=live)
    tl.store(out + 2 * count, weighted, mask=live)
    mine = (target >= first) & (target < tl.minimum(first + SPLIT * BLOCK_N, vocabulary))
    tl.store(found + at, logit, mask=live & mine)


@triton.jit
def merge_kernel(partial, found, out, count, splits, BLOCK: tl.constexpr):
    """out [4, count]: max z, sum exp(z - max), E_p[z - max], the target's logit centred. Splits in order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    peak = tl.full((BLOCK,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK,), dtype=tl.float32)
    base = partial + at
    for _ in range(0, splits):
        top = tl.load(base, mask=live, other=0.0)
        part = tl.load(base + count, mask=live, other=1.0)
        centred = tl.load(base + 2 * count, mask=live, other=0.0)
        higher = tl.maximum(peak, top)
        here = tl.exp(top - higher)
        shift = peak - higher
        weighted = tl.exp(shift) * (weighted + shift * total) + here * (centred + (top - higher) * part)
        total = tl.exp(shift) * total + here * part
        peak = higher
        base += 3 * count
    tl.store(out + at, peak, mask=live)
    tl.store(out + count + at, total, mask=live)
    tl.store(out + 2 * count + at, weighted / total, mask=live)
    tl.store(out + 3 * count + at, tl.load(found + at, mask=live, other=0.0) - peak, mask=live)


@triton.jit
def grad_kernel(
    hidden,
    weight,
    bias,
    rows,
    targets,
    temperature,
    coefficients,
    dz,
    count,
    first,
    last,
    width,
    vocab_start,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    dz_row,
    scale,
    softcap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    OPERAND: tl.constexpr,
    TMA: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dz [count, last - first] of vocabulary entries first..last. coefficients [4, count]: max z, and on_target,
    offset, slope as in `device.write_gradient`. Columns up to dz_row are written, zero beyond the slice."""
    row_tile, column_tile = place(tl.cdiv(count, BLOCK_M), tl.cdiv(last - first, BLOCK_N), GROUP)
    at = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    left = column_tile * BLOCK_N
    live = at < count
    token = tl.load(rows + at, mask=live, other=0)
    target = local_target(tl.load(targets + token, mask=live, other=-1), vocab_start, last)
    t = tl.load(temperature + token, mask=live, other=1.0)
    acc = tile(
        hidden,
        weight,
        row_tile * BLOCK_M,
        token,
        first + left,
        last,
        width,
        hidden_row,
        hidden_column,
        weight_row,
        weight_column,
        OPERAND,
        TMA,
        WHOLE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    peak = tl.load(coefficients + at, mask=live, other=0.0)[:, None]
    on_target = tl.load(coefficients + count + at, mask=live, other=0.0)[:, None]
    offset = tl.load(coefficients + 2 * count + at, mask=live, other=0.0)[:, None]
    slope = tl.load(coefficients + 3 * count + at, mask=live, other=0.0)[:, None]
    out = dz + at.to(tl.int64)[:, None] * dz_row
    parts = quarters(acc, BLOCK_M, BLOCK_N)
    for i in tl.static_range(4):
        column = left + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        entry = first + column
        z, cap = tile_logits(parts[i], bias, entry, last, scale, softcap, t, BIAS, SOFTCAP)
        centred = z - peak
        value = tl.exp(centred) * (offset + slope * centred)
        value += tl.where(entry[None, :] == target[:, None], on_target, 0.0)
        value = tl.where((entry < last)[None, :], value * cap, 0.0)
        tl.store(out + column[None, :], value.to(dz.dtype.element_ty), mask=live[:, None] & (column[None, :] < dz_row))


class Operands(NamedTuple):
    """How the kernels read hidden and weight: by pointer, or by descriptors of them, whose copies the device makes."""

    hidden: Tensor | TensorDescriptor
    weight: Tensor | TensorDescriptor
    strides: tuple[int, ...]
    flags: tuning.Config

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, rows: Tensor, config: tuning.Config, valid: Tensor | None = None
    ) -> Operands:
        """Descriptors where the row of the table says so and the weight lies as they need it. They cannot gather: valid
        rows are copied into one block where some are ignored. valid: hidden[rows], where that is there already."""
        width, operand = weight.shape[1], torch.promote_types(hidden.dtype, weight.dtype)
        flags = config | {"OPERAND": tuning.dot_dtype(operand), "WHOLE": width % config["BLOCK_K"] == 0}
        strides = (*hidden.stride(), *weight.stride())
        if not config["TMA"] or not described(weight) or width * hidden.itemsize % ALIGNMENT:
            return cls(hidden, weight, strides, flags | {"TMA": False})
        if len(rows) < len(hidden):
            hidden = hidden[rows] if valid is None else valid
        hidden = hidden if described(hidden) else hidden.clone(memory_format=torch.contiguous_format)
        h = TensorDescriptor.from_tensor(hidden, [config["BLOCK_M"], config["BLOCK_K"]])
        w = TensorDescriptor.from_tensor(weight, [config["BLOCK_N"], config["BLOCK_K"]])
        return cls(h, w, strides, flags)


def described(x: Tensor) -> bool:
    """Whether a descriptor can be made of this matrix."""
    aligned = x.data_ptr() % ALIGNMENT == 0 and x.stride(0) * x.itemsize % ALIGNMENT == 0
    return x.numel() > 0 and x.stride(1) == 1 and x.stride(0) >= x.shape[1] and aligned


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    shard: _vocab.Shard | None,
    vocab_start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, lse, gap, max z, log sum exp(z - max)), [N] each, 0 in ignored rows."""
    outputs = [targets.new_zeros(targets.shape, dtype=torch.float32) for _ in range(6)]
    rows = (targets != ignore_index).nonzero().view(-1)
    if len(rows):
        local = _statistics(hidden, weight, bias, rows, targets, temperature, softcap, logit_scale, vocab_start)
        at = targets[rows] - vocab_start
        owned = (at >= 0) & (at < weight.shape[0])
        if shard is not None:
            local = _vocab.merge(shard, weight.shape[0], local, owned)
        log_sum = local.sum.log()
        target = local.target if shard is not None else torch.where(owned, local.target, torch.nan)
        values = (target - log_sum, log_sum - local.mean, local.max + log_sum, target, local.max, log_sum)
        for out, value in zip(outputs, values, strict=True):
            out[rows] = value
    return outputs[0], outputs[1], outputs[2], outputs[3], outputs[4], outputs[5]


def _statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float | None,
    logit_scale: float,
    vocab_start: int,
) -> _vocab.Merged:
    """Statistics of these rows over this rank's entries."""
    count, (vocabulary, width) = len(rows), weight.shape
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    config = tuning.tile_config("logprobs", hidden.device, operand, width)
    splits = max(1, triton.cdiv(vocabulary, config["SPLIT"] * config["BLOCK_N"]))
    partial = torch.empty((splits, 3, count), dtype=torch.float32, device=hidden.device)
    found = torch.empty(count, dtype=torch.float32, device=hidden.device)
    read = Operands.of(hidden, weight, rows, config)
    tiles_kernel[(triton.cdiv(count, config["BLOCK_M"]) * splits,)](
        read.hidden,
        read.weight,
        None if bias is None else bias.float().contiguous(),
        rows,
        targets,
        temperature.expand(targets.shape).contiguous(),
        partial,
        found,
        count,
        vocabulary,
        width,
        vocab_start,
        *read.strides,
        logit_scale,
        softcap or 1.0,
        BIAS=bias is not None,
        SOFTCAP=softcap is not None,
        **read.flags,
    )
    out = torch.empty((4, count), dtype=torch.float32, device=hidden.device)
    programs = triton.cdiv(count, tuning.MERGE_BLOCK)
    merge_kernel[(programs,)](partial, found, out, count, splits, BLOCK=tuning.MERGE_BLOCK)
    return _vocab.Merged(out[0], out[1], torch.where(out[1] == 0, 0.0, out[2]), out[3], None)


def backward(
    upstream: list[Tensor],
    rows: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    softcap: float | None,
    logit_scale: float,
    vocab_start: int,
    chunk_bytes: int,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dh fp32, dW in the operands' dtype, db fp32), None where not needed. Only `rows` enter a GEMM."""
    count, (vocabulary, width) = len(rows), weight.shape
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    temperature = temperature.expand(targets.shape).contiguous()
    dh = torch.zeros((count, width), dtype=torch.float32, device=hidden.device) if need[0] else None
    dw = torch.zeros_like(weight, dtype=operand) if need[1] else None
    db = torch.zeros(vocabulary, dtype=torch.float32, device=hidden.device) if need[2] else None
    if count and vocabulary:
        g, u, lse = (x[rows] for x in upstream)
        chain = logit_scale / temperature[rows]
        share = chain * torch.exp(-log_sum[rows])
        offset = (lse - g + u * (log_sum - entropy)[rows]) * share
        coefficients = torch.stack([peak[rows], g * chain, offset, -u * share]).contiguous()
        config = tuning.tile_config("logprobs_backward", hidden.device, operand, width)
        size = slice_width(count, vocabulary, operand, config["BLOCK_N"], chunk_bytes)
        buffer = torch.empty((count, size), dtype=operand, device=hidden.device)
        h = hidden[rows].to(operand)
        read = Operands.of(hidden, weight, rows, config, h)
        wide_bias = None if bias is None else bias.float().contiguous()
        for first in range(0, vocabulary, size):
            last = min(first + size, vocabulary)
            grad_kernel[(triton.cdiv(count, config["BLOCK_M"]) * triton.cdiv(last - first, config["BLOCK_N"]),)](
                read.hidden,
                read.weight,
                wide_bias,
                rows,
                targets,
                temperature,
                coefficients,
                buffer,
                count,
                first,
                last,
                width,
                vocab_start,
                *read.strides,
                buffer.stride(0),
                logit_scale,
                softcap or 1.0,
                BIAS=bias is not None,
                SOFTCAP=softcap is not None,
                **read.flags,
            )
            dz = buffer[:, : last - first]
            part = weight[first:last].to(operand)
            if dh is not None:
                _gemm.accumulate(dh, dz, part)
            if dw is not None:
                with _gemm.ieee_float32(dz.device):
                    torch.mm(dz.T, h, out=dw[first:last])
            if db is not None:
                db[first:last] = dz.sum(0, dtype=torch.float32)
    if dh is not None:
        dh = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device).index_copy_(0, rows, dh)
    return dh, dw, db


def slice_width(count: int, vocabulary: int, operand: torch.dtype, block: int, chunk_bytes: int) -> int:
    """Vocabulary entries of a slice: dz [count, width] within chunk_bytes, in whole tiles, at least one."""
    most = max(1, chunk_bytes // (count * operand.itemsize * block)) * block
    return min(most, triton.cdiv(vocabulary, block) * block)
