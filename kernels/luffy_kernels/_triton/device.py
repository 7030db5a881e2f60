"""Functions that the kernels share: logits as the head defines them, online statistics, and gradients of logits.

Elementwise arithmetic is fp32. A block beyond the vocabulary is masked by its *padded* width, a multiple of 16, and its
values are chosen by the true one: a mask by an odd vocabulary would cut every 16-byte load into single elements.
"""

import triton
import triton.language as tl

from .. import _chunks

LOWEST = tl.constexpr(_chunks.LOWEST)
OUTSIDE = tl.constexpr(2 * _chunks.LOWEST)  # of no entry at all: exp is 0 even in a row whose entries are all LOWEST


@triton.jit
def local_target(target, vocab_start, vocabulary):
    """Where these entries hold the target, -1 if nowhere. int32: 64-bit comparisons with a tile's columns spill."""
    at = target - vocab_start
    return tl.where((at >= 0) & (at < vocabulary), at, -1).to(tl.int32)


@triton.jit
def tanh(x):
    """By exp, whose 1 - e^-2|x| cancels near 0; there the Taylor polynomial, within 2e-9 for |x| < 1/4."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)
    s = x * x
    near = x * (1.0 + s * (-0.33333333333 + s * (0.13333333333 + s * (-0.05396825397 + s * 0.02186948854))))
    return tl.where(tl.abs(x) < 0.25, near, far)


@triton.jit
def expm1(x):
    """exp(x) - 1 without the cancellation near 0: Taylor for |x| < 1/2."""
    s = 1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7 * (1.0 + x / 8))))))
    return tl.where(tl.abs(x) < 0.5, x * s, tl.exp(x) - 1.0)


@triton.jit
def transform(raw, scale, softcap, temperature, SOFTCAP: tl.constexpr):
    """z and dz/draw / (scale / temperature), from raw = h W^T + b. NaN stays NaN; -inf, masked, becomes LOWEST."""
    slope = 1.0
    if SOFTCAP:
        t = tanh(raw * (scale / softcap))
        slope = 1.0 - t * t
        z = tl.where(raw == float("-inf"), LOWEST, t * (softcap / temperature))
    else:
        z = raw * (scale / temperature)
    return tl.where(z < LOWEST, LOWEST, z), slope


@triton.jit
def load_logits(logits, bias, column, padded, scale, softcap, temperature, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """A block of a row that starts at `logits`: z and the slope of `transform`."""
    raw = tl.load(logits + column, mask=column < padded, other=0.0)
    if BIAS:
        raw += tl.load(bias + column, mask=column < padded, other=0.0)
    return transform(raw, scale, softcap, temperature, SOFTCAP)


@triton.jit
def row_statistics(
    logits,
    bias,
    padded,
    vocabulary,
    scale,
    softcap,
    temperature,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(max z, s = sum exp(z - max), E_p[z - max] s, sum (z - max)) of one row, in one pass over it."""
    peak = LOWEST
    total = 0.0
    weighted = 0.0
    flat = 0.0
    for start in range(0, padded, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        z, _ = load_logits(logits, bias, column, padded, scale, softcap, temperature, BIAS, SOFTCAP)
        z = tl.where(inside, z, OUTSIDE)
        higher = tl.maximum(peak, tl.max(z, axis=0))
        centred = z - higher
        e = tl.exp(centred)
        shift = peak - higher
        weighted = tl.exp(shift) * (weighted + shift * total) + tl.sum(e * centred, axis=0)
        total = tl.exp(shift) * total + tl.sum(e, axis=0)
        if AVERAGE:
            flat += shift * tl.minimum(start, vocabulary) + tl.sum(tl.where(inside, centred, 0.0), axis=0)
        peak = higher
    return peak, total, weighted, flat


@triton.jit
def target_logit(logits, bias, target, owned, scale, softcap, temperature, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """z of one entry of the row; NaN where it is not in the vocabulary."""
    raw = tl.load(logits + target, mask=owned, other=float("nan"))
    if BIAS:
        raw += tl.load(bias + target, mask=owned, other=0.0)
    z, _ = transform(raw, scale, softcap, temperature, SOFTCAP)
    return z


@triton.jit
def write_gradient(
    dz,
    logits,
    bias,
    target,
    padded,
    vocabulary,
    scale,
    softcap,
    temperature,
    peak,
    on_target,
    offset,
    slope,
    uniform,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row's gradient over the row itself, in dz's dtype: exp(z - peak) (offset + slope (z - peak)), and more.

    dz may be narrower than the logits and start where they do: entry i of dz never lies beyond entry i of the logits.
    The barrier keeps a fast warp from writing what a slow one has yet to read (`bench.aot` finds it between the two).
    """
    for start in range(0, padded, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z, cap = load_logits(logits, bias, column, padded, scale, softcap, temperature, BIAS, SOFTCAP)
        centred = z - peak
        # The target's share enters before the rounding: 1 - p cancels, and a 16-bit p would leave nothing of it.
        value = tl.exp(centred) * (offset + slope * centred) + uniform + tl.where(column == target, on_target, 0.0)
        value = tl.where(column < vocabulary, value * cap, 0.0)
        tl.debug_barrier()
        tl.store(dz + column, value.to(dz.dtype.element_ty), mask=column < padded)
