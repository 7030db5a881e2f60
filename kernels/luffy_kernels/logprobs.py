"""Log-probability, entropy and log-sum-exp of target tokens under a linear head: 1 GEMM, no [N, V] logits.

    z    = softcap(logit_scale * (hidden W^T + bias)) / temperature       N tokens, H hidden, V vocabulary
    logp = z[target] - lse     lse = logsumexp z     ent = -sum_v p_v log p_v       gap = z[target] - max z       (nats)

Differentiable in hidden, weight and bias through the first three results; backward recomputes the logits a chunk at a
time (4 GEMMs in all) and saves nothing but its inputs. Logits, statistics and dW are fp32 (fp64 for fp64 operands).

`cpp` fuses GEMM and statistics tile by tile, and a row's result depends neither on the other rows nor on the number of
threads. `torch` stores the logits of a chunk of `chunk_bytes`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _chunks, _library, _vocab
from ._checks import check_head, check_head_values, check_transform, per_token, positive

OP = "linear_logprobs"


class LogProbs(NamedTuple):
    """In nats, float32 (float64 for float64 operands), [...] in targets' shape, 0 in ignored rows."""

    logp: Tensor
    """Log-probability of the target, nats."""
    entropy: Tensor | None
    """Of the distribution, nats; None unless `return_entropy`."""
    lse: Tensor
    """Log-sum-exp of the logits."""
    gap: Tensor
    """How far the target is below the most likely token, 0 where it is as likely; without gradient."""


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
    tp_group: ProcessGroup | None = None,
    vocab_start: int = 0,
    chunk_bytes: int | None = None,
    backend: Literal["auto", "torch", "cpp", "triton"] = "auto",
) -> LogProbs:
    """Log-probability (nats) of each target token, without storing the logits.

    Args:
        hidden: [..., H] bfloat16, float16, float32 or float64.
        weight: [V, H] likewise, same device; GEMMs run in the promoted dtype of the two.
        targets: [...] int64, already aligned with hidden; rows holding `ignore_index` give 0 and no gradient.
        bias: [V] float; -inf masks an entry.
        temperature: positive number, or tensor that broadcasts to targets, with as many dimensions or none.
        softcap: positive: cap * tanh(x / cap), before the temperature; masked entries stay masked.
        logit_scale: positive, multiplies the logits before the cap.
        ignore_index: the target of rows that count for nothing.
        return_entropy: also return the entropy; it costs no GEMM.
        tp_group: ranks that hold a part of the vocabulary each (uneven parts, in any order); weight and bias are this
            rank's rows, from entry `vocab_start` on, and everything else is the same on all ranks. The gradient of
            hidden comes out summed over the ranks.
        vocab_start: first entry of this rank's part.
        chunk_bytes: bound of the [C, V] buffers (torch backend, and every backward); 256 MiB on CPU, 1 GiB on a device.
        backend: "auto" takes what `status()` says.

    Returns:
        LogProbs(logp, entropy or None, lse, gap).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a DTensor as weight, a number out of its range,
            an unknown or unavailable backend; on CPU also a target outside the vocabulary or a temperature in a tensor
            that is not positive (elsewhere those rows are NaN, and raise under LUFFY_KERNELS_DEBUG=1).
    """
    check_head(OP, hidden, weight, targets, bias)
    check_transform(OP, softcap, logit_scale)
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    group = _vocab.group_name(OP, tp_group)
    chosen = _library.resolve(OP, backend, hidden.device, operand, group is not None)
    logp, entropy, lse, gap, *_ = _library.implementation(OP, chosen)(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        per_token(OP, "temperature", temperature, targets, _chunks.compute_dtype(operand)),
        softcap,
        logit_scale,
        ignore_index,
        group,
        vocab_start,
        _library.chunk_budget(OP, chunk_bytes, hidden.device),
    )
    shape = targets.shape
    found = LogProbs(*(out.view(shape) for out in (logp, entropy, lse, gap.detach())))
    return found if return_entropy else found._replace(entropy=None)


def forward_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    tp_group: str | None,
    vocab_start: int,
    chunk_bytes: int,
    *,
    kernels: _chunks.RowKernels,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, lse, gap), [N] each, through the chunk driver."""
    n, operand = targets.shape[0], torch.promote_types(hidden.dtype, weight.dtype)
    head = _chunks.make_head(OP, weight, bias, temperature, softcap, logit_scale, operand, n, tp_group, vocab_start)
    check_head_values(OP, targets, head.vocabulary, ignore_index, temperature)
    outputs = [targets.new_zeros(targets.shape, dtype=temperature.dtype) for _ in range(4)]
    valid = (targets != ignore_index).nonzero().view(-1)
    most = min(kernels.chunk_rows(head, chunk_bytes, keep=False), len(valid))
    work = kernels.workspace(most, head)
    for part in _chunks.balanced(len(valid), most):
        rows = valid[part]
        stats = kernels.row_stats(hidden[rows].to(operand), rows, targets[rows], head, work, keep=False)
        for out, value in zip(outputs, (stats.logp, stats.entropy, stats.lse, stats.gap), strict=True):
            out[rows] = value
    return outputs[0], outputs[1], outputs[2], outputs[3]


def backward_chunks(
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
    tp_group: str | None,
    vocab_start: int,
    chunk_bytes: int,
    need: list[bool],
    *,
    kernels: _chunks.RowKernels,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias in their dtypes; empty where not needed. Zero rows enter no GEMM."""
    n, operand = targets.shape[0], torch.promote_types(hidden.dtype, weight.dtype)
    head = _chunks.make_head(OP, weight, bias, temperature, softcap, logit_scale, operand, n, tp_group, vocab_start)
    grads = _chunks.Gradients(hidden, head, (need[0], need[1], need[2]))
    upstream = [g.to(temperature.dtype) for g in (grad_logp, grad_entropy, grad_lse)]
    active = active_rows(targets, ignore_index, upstream)
    most = min(kernels.chunk_rows(head, chunk_bytes), len(active))
    work = kernels.workspace(most, head)
    # Without an entropy term a chunk needs less arithmetic.
    in_entropy = bool((grad_entropy != 0).any())
    for part in _chunks.balanced(len(active), most):
        rows = active[part]
        h, y = hidden[rows].to(operand), targets[rows]
        g, u, lse = (grad[rows] for grad in upstream)
        stats = kernels.row_stats(h, rows, y, head, work)
        kernels.add_grads(stats, rows, y, h, g, u if in_entropy else None, lse, head, work, grads)
    like = (hidden, weight, weight if bias is None else bias)
    scaled = [
        hidden.new_empty(0) if g is None else g.to(x.dtype, copy=True)
        for g, x in zip(grads.all(head), like, strict=True)
    ]
    return scaled[0], scaled[1], scaled[2]


def active_rows(targets: Tensor, ignore_index: int, upstream: list[Tensor]) -> Tensor:
    """Indices of the valid rows with any upstream gradient."""
    live = (upstream[0] != 0) | (upstream[1] != 0) | (upstream[2] != 0)
    return ((targets != ignore_index) & live).nonzero().view(-1)


def logprobs_triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    tp_group: str | None,
    vocab_start: int,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, lse, gap, max z, log sum exp(z - max)), [N] each; the last two are what backward needs again."""
    from ._triton import logprobs

    shard = _vocab.make_shard(OP, tp_group, vocab_start, weight.shape[0], weight.device)
    vocabulary = weight.shape[0] if shard is None else shard.total
    check_head_values(OP, targets, vocabulary, ignore_index, temperature)
    return logprobs.forward(
        hidden,
        weight,
        bias,
        targets.contiguous(),
        positive(temperature),
        softcap,
        logit_scale,
        ignore_index,
        shard,
        vocab_start,
    )


def backward_triton(
    grad_logp: Tensor,
    grad_entropy: Tensor,
    grad_lse: Tensor,
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
    ignore_index: int,
    tp_group: str | None,
    vocab_start: int,
    chunk_bytes: int,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward_chunks`, over slices of the vocabulary, from the statistics of the forward pass."""
    from ._triton import logprobs

    shard = _vocab.make_shard(OP, tp_group, vocab_start, weight.shape[0], weight.device)
    upstream = [g.to(torch.float32) for g in (grad_logp, grad_entropy, grad_lse)]
    rows = active_rows(targets, ignore_index, upstream)
    saved = (hidden, weight, bias, targets.contiguous(), temperature, peak, log_sum, entropy)
    dh, dw, db = logprobs.backward(
        upstream, rows, *saved, softcap, logit_scale, vocab_start, chunk_bytes, (need[0], need[1], need[2])
    )
    _vocab.sum_over(shard, dh)
    like = ((dh, hidden), (dw, weight), (db, weight if bias is None else bias))
    scaled = [hidden.new_empty(0) if g is None else g.to(x.dtype) for g, x in like]
    return scaled[0], scaled[1], scaled[2]


def _fake(hidden, weight, bias, targets, temperature, *_):
    return tuple(temperature.new_empty(targets.shape) for _ in range(4))


def _fake_triton(hidden, weight, bias, targets, temperature, *_):
    return tuple(temperature.new_empty(targets.shape) for _ in range(6))


def _fake_backward(grad_logp, grad_entropy, grad_lse, hidden, weight, bias, targets, *rest):
    empty = hidden.new_empty(0)
    need = rest[-1]
    like = (hidden, weight, weight.new_empty(weight.shape[0]) if bias is None else bias)
    return tuple(
        x.new_empty(x.shape) if wanted else torch.empty_like(empty) for x, wanted in zip(like, need, strict=True)
    )


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    # The Triton forward's statistics serve its backward; the others recompute theirs with the logits.
    ctx.save_for_backward(*inputs[:5], *((output[4], output[5], output[1]) if len(output) == 6 else ()))
    ctx.options = inputs[5:]


def _register(backend: str, forward, recompute, options=None) -> None:
    def backward(ctx, *upstream):
        need = list(ctx.needs_input_grad[:3])
        if all(grad is None for grad in upstream[:3]) or not any(need):
            return (None,) * 11
        hidden, weight, bias, targets, temperature, *stats = ctx.saved_tensors
        zero = torch.zeros_like(targets, dtype=temperature.dtype)
        filled = [zero if g is None else g.contiguous() for g in upstream[:3]]
        grads = recompute(*filled, hidden, weight, bias, targets, temperature, *stats, *ctx.options, need)
        return (*(grad if wanted else None for grad, wanted in zip(grads, need, strict=True)), *(None,) * 8)

    op = _library.define(f"logprobs_{backend}", forward, options)
    op.register_fake(_fake_triton if backend == "triton" else _fake)
    op.register_autograd(backward, setup_context=_setup)
    _library.register(OP, backend, op)


def _chunked(backend: str) -> None:
    def kernels() -> dict[str, object]:
        return {"kernels": _library.row_kernels(backend)}

    recompute = _library.define(f"logprobs_backward_{backend}", backward_chunks, kernels)
    recompute.register_fake(_fake_backward)
    _register(backend, forward_chunks, recompute, kernels)


_chunked("torch")
_chunked("cpp")
_backward_triton = _library.define("logprobs_backward_triton", backward_triton)
_backward_triton.register_fake(_fake_backward)
_register("triton", logprobs_triton, _backward_triton)
