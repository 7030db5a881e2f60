"""Log-probability, entropy and log-sum-exp of target tokens under a linear head: 1 GEMM, no [N, V] logits.

    z    = softcap(logit_scale * (hidden W^T + bias)) / temperature       N tokens, H hidden, V vocabulary
    logp = z[target] - lse     lse = logsumexp z     ent = -sum_v p_v log p_v       (nats)

Differentiable in hidden, weight and bias through all three results; backward recomputes the logits a chunk at a time
(4 GEMMs in all) and saves nothing but its inputs. Logits, statistics and dW are fp32 (fp64 for fp64 operands).

`cpp` fuses GEMM and statistics tile by tile: its memory does not grow with V, and a row's result depends neither on the
other rows nor on the number of threads. `torch` uses the chunk driver and needs `chunk_bytes` (`_chunks.chunk_rows`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _chunks, _library
from ._checks import check_head, check_head_values, per_token, require

OP = "linear_logprobs"


class LogProbs(NamedTuple):
    """Float32 (float64 for float64 operands), in targets' shape, 0 in ignored rows."""

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    chunk_bytes: int | None = None,
    backend: Literal["auto", "torch", "cpp"] = "auto",
) -> LogProbs:
    """Log-probability of each target token, without storing the logits.

    Args:
        hidden: [..., H] float. weight: [V, H] float, same device; GEMMs run in the promoted dtype of the two.
        targets: [...] int64, already aligned with hidden; rows holding `ignore_index` give 0 and no gradient.
        bias: [V] float; -inf masks an entry. temperature: positive number, or tensor broadcastable to targets.
        softcap: cap * tanh(x / cap), before the temperature.
        return_entropy: also return the entropy; it costs no GEMM.
        chunk_bytes: bound of the [C, V] buffers (torch backend, and every backward); 256 MiB on CPU, 1 GiB on a device.

    Returns:
        LogProbs(logp, entropy or None, lse).

    Raises:
        ValueError: what `_checks` lists, an unknown or unavailable backend.
    """
    check_head(OP, hidden, weight, targets, bias)
    require(softcap is None or softcap > 0, OP, "softcap", "positive", softcap)
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    op = _library.resolve(OP, backend, hidden.device, operand)
    logp, entropy, lse = op(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        per_token(OP, "temperature", temperature, targets, _chunks.compute_dtype(operand)),
        softcap,
        logit_scale,
        ignore_index,
        _library.chunk_budget(OP, chunk_bytes, hidden.device),
    )
    shape = targets.shape
    return LogProbs(logp.view(shape), entropy.view(shape) if return_entropy else None, lse.view(shape))


@torch.library.custom_op("luffy_kernels::logprobs_torch", mutates_args=())
def logprobs_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse), [N] each, through the chunk driver."""
    check_head_values(OP, targets, weight.shape[0], ignore_index, temperature)
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    head = _chunks.make_head(weight, bias, temperature, softcap, logit_scale, operand, targets.shape[0])
    outputs = [targets.new_zeros(targets.shape, dtype=temperature.dtype) for _ in range(3)]
    valid = (targets != ignore_index).nonzero().view(-1)
    most = min(_chunks.chunk_rows(head, chunk_bytes), len(valid))
    work = _chunks.Workspace(most, head)
    for part in _chunks.balanced(len(valid), most):
        rows = valid[part]
        stats = _chunks.row_stats(hidden[rows].to(operand), rows, targets[rows], head, work)
        for out, value in zip(outputs, (stats.logp, stats.entropy, stats.lse), strict=True):
            out[rows] = value
    return outputs[0], outputs[1], outputs[2]


@torch.library.custom_op("luffy_kernels::logprobs_cpp", mutates_args=())
def logprobs_cpp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse), [N] each, by csrc/logprobs.cpp on the valid rows."""
    check_head_values(OP, targets, weight.shape[0], ignore_index, temperature)
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    outputs = [targets.new_zeros(targets.shape, dtype=torch.float32) for _ in range(3)]
    rows = (targets != ignore_index).nonzero().view(-1)
    if len(rows):
        values = torch.ops.luffy_kernels.logprobs_cpp_rows(
            hidden[rows].to(operand).contiguous(),
            weight.to(operand).contiguous(),
            None if bias is None else bias.float().contiguous(),
            targets[rows],
            temperature.expand(targets.shape)[rows],
            softcap,
            logit_scale,
        )
        for out, value in zip(outputs, values, strict=True):
            out[rows] = value
    return outputs[0], outputs[1], outputs[2]


@torch.library.custom_op("luffy_kernels::logprobs_backward_torch", mutates_args=())
def logprobs_backward(
    grad_logp: Tensor,
    grad_entropy: Tensor,
    grad_lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    chunk_bytes: int,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias in their dtypes; empty where not needed. Zero rows enter no GEMM."""
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    head = _chunks.make_head(weight, bias, temperature, softcap, logit_scale, operand, targets.shape[0])
    grads = _chunks.Gradients(hidden, head, (need[0], need[1], need[2]))
    upstream = [g.to(temperature.dtype) for g in (grad_logp, grad_entropy, grad_lse)]
    live = (upstream[0] != 0) | (upstream[1] != 0) | (upstream[2] != 0)
    active = ((targets != ignore_index) & live).nonzero().view(-1)
    most = min(_chunks.chunk_rows(head, chunk_bytes), len(active))
    work = _chunks.Workspace(most, head)
    for part in _chunks.balanced(len(active), most):
        rows = active[part]
        h, y = hidden[rows].to(operand), targets[rows]
        g, u, lse = (grad[rows] for grad in upstream)
        stats = _chunks.row_stats(h, rows, y, head, work)
        grads.add(_chunks.logits_grad(stats, rows, y, g, u, lse, head, work), h, rows, head)
    like = (hidden, weight, weight if bias is None else bias)
    scaled = [
        hidden.new_empty(0) if g is None else g.to(x.dtype, copy=True) for g, x in zip(grads.all(), like, strict=True)
    ]
    return scaled[0], scaled[1], scaled[2]


def _fake(hidden, weight, bias, targets, temperature, *_):
    outputs = [temperature.new_empty(targets.shape) for _ in range(3)]
    return outputs[0], outputs[1], outputs[2]


@logprobs_backward.register_fake
def _fake_backward(grad_logp, grad_entropy, grad_lse, hidden, weight, bias, targets, *rest):
    empty = hidden.new_empty(0)
    need = rest[-1]
    like = (hidden, weight, weight.new_empty(weight.shape[0]) if bias is None else bias)
    return tuple(
        torch.empty_like(x) if wanted else torch.empty_like(empty) for x, wanted in zip(like, need, strict=True)
    )


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _backward(ctx, *upstream):
    need = list(ctx.needs_input_grad[:3])
    if all(grad is None for grad in upstream) or not any(need):
        return (None,) * 9
    hidden, weight, bias, targets, temperature = ctx.saved_tensors
    filled = [torch.zeros_like(targets, dtype=temperature.dtype) if g is None else g.contiguous() for g in upstream]
    grads = logprobs_backward(*filled, hidden, weight, bias, targets, temperature, *ctx.options, need)
    return (*(grad if wanted else None for grad, wanted in zip(grads, need, strict=True)), *(None,) * 6)


for _backend, _op in (("torch", logprobs_torch), ("cpp", logprobs_cpp)):
    _op.register_fake(_fake)
    _op.register_autograd(_backward, setup_context=_setup)
    _library.register(OP, _backend, _op)
