"""Cross-entropy of a linear head without the logits: 3 GEMMs for a scalar, 4 for per-token losses.

    z    = softcap(logit_scale * (hidden W^T + bias)) / temperature        [N, V], a chunk at a time, fp32
    loss = (1 - s) (lse - z_target) + s (lse - mean_v z) + z_loss lse^2     s = label_smoothing

N tokens, H hidden, V vocabulary. A scalar's gradients are computed in the forward sweep and only scaled by backward;
per-token losses (`reduction="none"`) recompute the logits, because their upstream gradient is not known before.
Memory and determinism as in `linear_policy_loss`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _chunks, _cpp_rows, _library, _torch_rows, _vocab
from ._checks import check_head, check_head_values, check_transform, checked_normalizer, per_token, require

OP = "linear_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    normalizer: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    tp_group: ProcessGroup | None = None,
    vocab_start: int = 0,
    chunk_bytes: int | None = None,
    backend: Literal["auto", "torch", "cpp", "triton"] = "auto",
) -> Tensor:
    """Negative log-likelihood (nats) of the targets, differentiable in hidden, weight and bias.

    `linear_logprobs` says more of the arguments that it has too.

    Args:
        hidden: [..., H] float.
        weight: [V, H] float.
        targets: [...] int64.
        reduction: "mean" divides the sum over valid rows by `normalizer`, their number by default (0 rows give 0);
            "sum" divides by nothing; "none" gives targets' shape, 0 in ignored rows.
        normalizer: positive number or 0-d tensor.
        label_smoothing: in [0, 1), the share that every entry gets alike (arXiv 1512.00567, section 7).
        z_loss: coefficient of lse^2, at least 0 (arXiv 2204.02311, section 5).
        bias: [V] float.
        temperature: positive number, or tensor like targets.
        softcap: positive.
        logit_scale: positive.
        ignore_index: of rows that count for nothing.
        tp_group: ranks that hold a part of the vocabulary each.
        vocab_start: first entry of this rank's part.
        chunk_bytes: bound of the [C, V] buffers; 256 MiB on CPU, 1 GiB on a device.
        backend: "auto" takes what `status()` says.

    Returns:
        float32 (float64 for float64 operands): 0-d, or [...] in targets' shape.

    Raises:
        ValueError: as `linear_logprobs`; an unknown reduction, a normaliser that is not positive or without "mean",
            label_smoothing or z_loss out of range.
    """
    check_head(OP, hidden, weight, targets, bias)
    require(reduction in REDUCTIONS, OP, "reduction", f"one of {REDUCTIONS}", repr(reduction))
    require(normalizer is None or reduction == "mean", OP, "normalizer", "None unless reduction is 'mean'", normalizer)
    require(0 <= label_smoothing < 1, OP, "label_smoothing", "in [0, 1)", label_smoothing)
    require(0 <= z_loss < float("inf"), OP, "z_loss", "finite and at least 0", z_loss)
    check_transform(OP, softcap, logit_scale)
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    dtype = _chunks.compute_dtype(operand)
    grad = torch.is_grad_enabled()
    group = _vocab.group_name(OP, tp_group)
    args = (
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        label_smoothing,
        z_loss,
        per_token(OP, "temperature", temperature, targets, dtype),
        softcap,
        logit_scale,
        ignore_index,
        group,
        vocab_start,
        _library.chunk_budget(OP, chunk_bytes, hidden.device),
    )
    need = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    chosen = _library.resolve(OP, backend, hidden.device, operand, group is not None)
    total, per_row, *_ = _library.implementation(OP, chosen)(*args, reduction == "none", need)
    if reduction == "none":
        return per_row.view(targets.shape)
    if reduction == "sum":
        return total
    if normalizer is None:
        return total / (targets != ignore_index).sum().clamp(min=1).to(dtype)
    return total / checked_normalizer(OP, normalizer, hidden.device, dtype)


def sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float,
    z_loss: float,
    temperature: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    tp_group: str | None,
    vocab_start: int,
    chunk_bytes: int,
    per_token: bool,
    need: list[bool],
    *,
    kernels: _chunks.RowKernels,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss sum, loss [N], dh, dW, db). With `per_token` the gradients are left to backward, which recomputes: then row
    t's gradient is scaled by upstream[t], and rows where that is 0 enter no GEMM."""
    n, operand = targets.shape[0], torch.promote_types(hidden.dtype, weight.dtype)
    if kernels is _cpp_rows and label_smoothing > 0 and softcap is not None:
        # Every entry has a share then, times its cap's slope; where exp(z - z_y) is 0 nothing is left to tell it by.
        kernels = kernels if bool((softcap / temperature <= _cpp_rows.MOST_CAP).all()) else _torch_rows
    head = _chunks.make_head(OP, weight, bias, temperature, softcap, logit_scale, operand, n, tp_group, vocab_start)
    check_head_values(OP, targets, head.vocabulary, ignore_index, temperature)
    loss = targets.new_zeros(targets.shape, dtype=temperature.dtype)
    need = [wanted and (upstream is not None or not per_token) for wanted in need]
    grads = _chunks.Gradients(hidden, head, (need[0], need[1], need[2]))
    live = targets != ignore_index if upstream is None else (targets != ignore_index) & (upstream != 0)
    active = live.nonzero().view(-1)
    keep = any(need)
    most = min(kernels.chunk_rows(head, chunk_bytes, keep), len(active))
    work = kernels.workspace(most, head)
    for part in _chunks.balanced(len(active), most):
        rows = active[part]
        h, y = hidden[rows].to(operand), targets[rows]
        stats = kernels.row_stats(h, rows, y, head, work, average=label_smoothing > 0, keep=keep)
        value = z_loss * stats.lse.square() - (1 - label_smoothing) * stats.logp
        if stats.average is not None:
            value = value + label_smoothing * (stats.sum.log() - stats.average)
        loss[rows] = value
        if keep:
            scale = torch.ones_like(value) if upstream is None else upstream[rows]
            in_lse = (label_smoothing + 2 * z_loss * stats.lse) * scale
            uniform = scale * (-label_smoothing / head.vocabulary) if label_smoothing else None
            g = (label_smoothing - 1) * scale
            kernels.add_grads(stats, rows, y, h, g, None, in_lse, head, work, grads, uniform)
    dh, dw, db = (hidden.new_empty(0) if x is None else x for x in grads.all(head))
    return loss.sum(dtype=torch.float64).to(loss.dtype), loss, dh, dw, db


def backward_sweep(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float,
    z_loss: float,
    temperature: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    tp_group: str | None,
    vocab_start: int,
    chunk_bytes: int,
    need: list[bool],
    *,
    kernels: _chunks.RowKernels,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, dW, db) of per-token losses with this upstream gradient, [N]."""
    head = (hidden, weight, bias, targets, label_smoothing, z_loss, temperature, softcap, logit_scale, ignore_index)
    options = (tp_group, vocab_start, chunk_bytes, True, need)
    _, _, dh, dw, db = sweep(*head, *options, kernels=kernels, upstream=upstream.to(temperature.dtype))
    return dh, dw, db


def _fake(hidden, weight, bias, targets, label_smoothing, z_loss, temperature, *rest):
    dtype, (per_token, need) = temperature.dtype, rest[-2:]
    grads = _chunks.fake_grads(hidden, weight, dtype, [False] * 3 if per_token else need)
    return (hidden.new_empty((), dtype=dtype), hidden.new_empty(targets.shape, dtype=dtype), *grads)


def _fake_backward(upstream, hidden, weight, bias, targets, label_smoothing, z_loss, temperature, *rest):
    return _chunks.fake_grads(hidden, weight, temperature.dtype, rest[-1])


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.per_token, ctx.need = inputs[-2:]
    if ctx.per_token:
        ctx.save_for_backward(*inputs[:4], inputs[6])
        ctx.options = (inputs[4:6], inputs[7:13])
    else:
        ctx.save_for_backward(*output[2:])


def _register(backend: str) -> None:
    def kernels() -> dict[str, object]:
        return {"kernels": _library.row_kernels(backend)}

    op = _library.define(f"cross_entropy_{backend}", sweep, kernels)
    recompute = _library.define(f"cross_entropy_backward_{backend}", backward_sweep, kernels)

    def backward(ctx, grad_sum, grad_rows, *_):
        upstream = grad_rows if ctx.per_token else grad_sum
        if upstream is None or not any(ctx.need):
            return (None,) * 15
        saved = ctx.saved_tensors
        if ctx.per_token:
            *head, temperature = saved
            (smoothing, z_loss), rest = ctx.options
            grads = recompute(upstream, *head, smoothing, z_loss, temperature, *rest, ctx.need)
            kept = zip(grads, ctx.dtypes, ctx.need, strict=True)
            return (*(x.to(dtype) if wanted else None for x, dtype, wanted in kept), *(None,) * 12)
        kept = zip(saved, ctx.dtypes, ctx.need, strict=True)
        return (*(_chunks.scaled(x, upstream, dtype) if wanted else None for x, dtype, wanted in kept), *(None,) * 12)

    op.register_fake(_fake)
    recompute.register_fake(_fake_backward)
    op.register_autograd(backward, setup_context=_setup)
    _library.register(OP, backend, op)


for _backend_name in ("torch", "cpp", "triton"):
    _register(_backend_name)
