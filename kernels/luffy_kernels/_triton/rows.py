"""Row kernels over materialised logits of a chunk, one program per row, and the `RowKernels` of the chunk driver.

    policy_rows   linear_policy_loss in one launch: statistics, token loss, outputs, dz
    stats_rows    statistics alone        } for what no table holds: custom losses, cross-entropy,
    grad_rows     dz alone                } a vocabulary spread over ranks

A logit is written once in fp32 by the GEMM, read twice, and its gradient written once *over it* in the operands' dtype:
8 + 2 bytes beside the GEMM's 4, where two passes over fp32 need at least that. One [C, V] buffer in all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _chunks, _vocab
from . import tuning
from .device import row_statistics, target_logit, write_gradient
from .token_losses import COLUMNS, evaluate, kl_term


@triton.jit
def policy_rows_kernel(
    logits,
    dz,
    bias,
    rows,
    targets,
    temperature,
    table,
    loss_id,
    advantages,
    old_logp,
    ref_logp,
    token_weight,
    entropy_coef,
    kl_coef,
    out_loss,
    out_logp,
    out_entropy,
    out_ratio,
    out_kl,
    out_clipped,
    stride,
    dz_stride,
    padded,
    vocabulary,
    scale,
    softcap,
    kl_type,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    OLD: tl.constexpr,
    REF: tl.constexpr,
    WEIGHT: tl.constexpr,
    ENTROPY: tl.constexpr,
    KL: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row of the chunk; `rows` says which token it is. Per-token arrays are indexed by token."""
    at = tl.program_id(0).to(tl.int64)
    token = tl.load(rows + at)
    target = tl.load(targets + token)
    t = tl.load(temperature + token)
    logits += at * stride
    peak, total, weighted, _ = row_statistics(
        logits, bias, padded, vocabulary, scale, softcap, t, BIAS, SOFTCAP, False, BLOCK
    )
    owned = (target >= 0) & (target < vocabulary)
    mean = weighted / total
    log_sum = tl.log(total)
    logp = target_logit(logits, bias, target, owned, scale, softcap, t, BIAS, SOFTCAP) - peak - log_sum
    entropy = log_sum - mean

    old = logp
    if OLD:
        old = tl.load(old_logp + token)
    row = table + tl.load(loss_id + token) * COLUMNS
    loss, g, ratio, clipped = evaluate(row, logp, tl.load(advantages + token), old, OLD)
    if WEIGHT:
        weight = tl.load(token_weight + token)
        loss *= weight
        g *= weight
    kl = 0.0
    if REF:
        kl, kl_slope = kl_term(logp, tl.load(ref_logp + token), kl_type)
        if KL:
            coefficient = tl.load(kl_coef + token)
            loss += coefficient * kl
            g += coefficient * kl_slope
    u = 0.0
    if ENTROPY:
        u = -tl.load(entropy_coef + token)
        loss += u * entropy
    tl.store(out_loss + token, loss)
    tl.store(out_logp + token, logp)
    tl.store(out_entropy + token, entropy)
    tl.store(out_ratio + token, ratio)
    tl.store(out_kl + token, kl)
    tl.store(out_clipped + token, clipped.to(tl.int8))
    if BACKWARD:
        chain = scale / t
        offset = (u * mean - g) * chain / total
        write_gradient(
            dz + at * dz_stride,
            logits,
            bias,
            target,
            padded,
            vocabulary,
            scale,
            softcap,
            t,
            peak,
            g * chain,
            offset,
            -u * chain / total,
            0.0,
            BIAS,
            SOFTCAP,
            BLOCK,
        )


@triton.jit
def stats_rows_kernel(
    logits,
    bias,
    rows,
    targets,
    temperature,
    out,
    count,
    stride,
    padded,
    vocabulary,
    vocab_start,
    scale,
    softcap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [5, count]: max z, sum exp(z - max), E_p[z - max], the target's logit centred, mean of the centred logits."""
    at = tl.program_id(0).to(tl.int64)
    token = tl.load(rows + at)
    target = tl.load(targets + token) - vocab_start
    t = tl.load(temperature + token)
    logits += at * stride
    peak, total, weighted, flat = row_statistics(
        logits, bias, padded, vocabulary, scale, softcap, t, BIAS, SOFTCAP, AVERAGE, BLOCK
    )
    owned = (target >= 0) & (target < vocabulary)
    centred = target_logit(logits, bias, target, owned, scale, softcap, t, BIAS, SOFTCAP) - peak
    tl.store(out + at, peak)
    tl.store(out + count + at, total)
    tl.store(out + 2 * count + at, tl.where(total == 0, 0.0, weighted / total))
    tl.store(out + 3 * count + at, centred)
    tl.store(out + 4 * count + at, flat / tl.maximum(vocabulary, 1))


@triton.jit
def grad_rows_kernel(
    logits,
    dz,
    bias,
    rows,
    targets,
    temperature,
    peak,
    on_target,
    offset,
    slope,
    uniform,
    stride,
    dz_stride,
    padded,
    vocabulary,
    vocab_start,
    scale,
    softcap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNIFORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dz over the logits, from per-row coefficients of the chunk, [C] each."""
    at = tl.program_id(0).to(tl.int64)
    token = tl.load(rows + at)
    share = 0.0
    if UNIFORM:
        share = tl.load(uniform + at)
    write_gradient(
        dz + at * dz_stride,
        logits + at * stride,
        bias,
        tl.load(targets + token) - vocab_start,
        padded,
        vocabulary,
        scale,
        softcap,
        tl.load(temperature + token),
        tl.load(peak + at),
        tl.load(on_target + at),
        tl.load(offset + at),
        tl.load(slope + at),
        share,
        BIAS,
        SOFTCAP,
        BLOCK,
    )


def padded_width(vocabulary: int) -> int:
    """Columns of the logits buffer: 16 fp32 are 64 bytes, so every row of either dtype starts on a 32-byte boundary."""
    return max(16, -(-vocabulary // 16) * 16)


def chunk_rows(head: _chunks.Head, chunk_bytes: int, keep: bool = True) -> int:
    """Rows of a chunk, C = max(1, chunk_bytes // (4 V')), V' the largest shard rounded up to 16."""
    return max(1, chunk_bytes // (4 * padded_width(head.widest)))


class Workspace:
    """One fp32 buffer, [C, V'], and the same bytes in the operands' dtype; and what a launch needs of the head."""

    def __init__(self, rows: int, head: _chunks.Head) -> None:
        device, self.padded = head.weight.device, padded_width(head.weight.shape[0])
        self.logits = torch.empty((rows, self.padded), dtype=torch.float32, device=device)
        self.dz = self.logits.view(head.weight.dtype)
        self.temperature = head.temperature.contiguous()
        self.bias = None if head.bias is None else torch.zeros(self.padded, device=device)
        if head.bias is not None and self.bias is not None:
            self.bias[: head.bias.shape[0]] = head.bias
        self.wide = _chunks.wide_weight(head)
        self.config = tuning.row_config("rows", device, self.padded)


workspace = Workspace


def row_stats(
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    head: _chunks.Head,
    work: Workspace,
    average: bool = False,
    keep: bool = True,
) -> _chunks.Stats:
    count, vocabulary = hidden.shape[0], head.weight.shape[0]
    z = work.logits[:count]
    _chunks.write_logits(z[:, :vocabulary], hidden, head, work.wide)
    out = torch.empty((5, count), dtype=torch.float32, device=z.device)
    # The kernel indexes per-token arrays by token; here targets are the chunk's own, so the chunk's index serves both.
    here = torch.arange(count, device=z.device)
    stats_rows_kernel[(count,)](
        z,
        work.bias,
        here,
        targets,
        work.temperature[rows],
        out,
        count,
        work.padded,
        work.padded,
        vocabulary,
        0 if head.shard is None else head.shard.start,
        head.logit_scale,
        head.softcap or 1.0,
        BIAS=work.bias is not None,
        SOFTCAP=head.softcap is not None,
        AVERAGE=average,
        **work.config,
    )
    _, owned = head.locate(targets)
    peak, total, mean, target, flat = out
    return _chunks.finish(z, None, _vocab.Merged(peak, total, mean, target, flat if average else None), owned, head)


def logits_grad(
    stats: _chunks.Stats,
    rows: Tensor,
    targets: Tensor,
    g: Tensor,
    u: Tensor | None,
    lse: Tensor | None,
    head: _chunks.Head,
    work: Workspace,
    uniform: Tensor | None = None,
) -> Tensor:
    count, vocabulary = g.shape[0], head.weight.shape[0]
    temperature = work.temperature[rows]
    chain = head.logit_scale / temperature
    flat = -g if lse is None else lse - g
    offset = (flat if u is None else flat + u * stats.mean) * chain / stats.sum
    slope = torch.zeros_like(offset) if u is None else -u * chain / stats.sum
    grad_rows_kernel[(count,)](
        stats.logits,
        work.dz,
        work.bias,
        torch.arange(count, device=g.device),
        targets,
        temperature,
        stats.max,
        g * chain,
        offset,
        slope,
        None if uniform is None else uniform * chain,
        work.padded,
        work.dz.stride(0),
        work.padded,
        vocabulary,
        0 if head.shard is None else head.shard.start,
        head.logit_scale,
        head.softcap or 1.0,
        BIAS=work.bias is not None,
        SOFTCAP=head.softcap is not None,
        UNIFORM=uniform is not None,
        **work.config,
    )
    return work.dz[:count, :vocabulary]


def add_grads(stats, rows, targets, hidden, g, u, lse, head, work, grads, uniform=None) -> None:
    """Adds this chunk's gradients, from `logits_grad`."""
    grads.add(logits_grad(stats, rows, targets, g, u, lse, head, work, uniform), hidden, rows, head)


def policy_rows(hidden, rows, targets, tokens, head, work, outputs, backward) -> Tensor:
    """A chunk of `_policy_sweep` in one launch: fills the outputs at `rows`, returns dz [C, V] (with `backward`)."""
    count, vocabulary = hidden.shape[0], head.weight.shape[0]
    z = work.logits[:count]
    _chunks.write_logits(z[:, :vocabulary], hidden, head, work.wide)
    policy_rows_kernel[(count,)](
        z,
        work.dz,
        work.bias,
        rows,
        targets,
        work.temperature,
        tokens.table,
        tokens.ids,
        tokens.advantages,
        tokens.old_logp,
        tokens.ref_logp,
        tokens.weight,
        tokens.entropy_coef,
        tokens.kl_coef,
        *outputs[:5],
        outputs[5].view(torch.int8),
        work.padded,
        work.dz.stride(0),
        work.padded,
        vocabulary,
        head.logit_scale,
        head.softcap or 1.0,
        int(tokens.kl_type[1]),
        BIAS=work.bias is not None,
        SOFTCAP=head.softcap is not None,
        OLD=tokens.old_logp is not None,
        REF=tokens.ref_logp is not None,
        WEIGHT=tokens.weight is not None,
        ENTROPY=tokens.entropy_coef is not None,
        KL=tokens.kl_coef is not None and tokens.ref_logp is not None,
        BACKWARD=backward,
        **work.config,
    )
    return work.dz[:count, :vocabulary]
