"""The operators behind `linear_policy_loss`: one sweep over chunks gives the loss and its gradients.

A row's coefficients g = dL/dlogp and u = dL/dentropy are known as soon as its statistics are, so each chunk runs GEMM,
row arithmetic, two GEMMs, and is forgotten. The loss is summed, not divided: the normaliser would flush small fp16
gradients to zero, so it is applied to the fp32 sum and, through the chain rule, when backward scales what was saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _chunks, _library, token_losses
from ._checks import check_head_values

OP = "linear_policy_loss"


class Tokens(NamedTuple):
    """Per-token inputs of a sweep, [N] each."""

    table: Tensor  # [losses + 1, columns], the last row NaN
    ids: Tensor  # [N] row of the table of each token
    advantages: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    weight: Tensor | None
    entropy_coef: Tensor | None
    kl_coef: Tensor | None
    kl_type: str
    custom: dict[int, token_losses.TokenLoss]  # by that index

    def evaluate(self, at: Tensor, stats: _chunks.Stats) -> tuple[Tensor, Tensor, Tensor, token_losses.Evaluated]:
        """Weighted loss incl. KL and entropy, its derivative in logp, the KL, and the bare token loss."""
        logp = stats.logp
        cut = [None if x is None else x[at] for x in (self.old_logp, self.ref_logp, self.weight)]
        old_logp, ref_logp, weight = cut
        token = token_losses.evaluate(logp, self.advantages[at], old_logp, self.table[self.ids[at]])
        for index, spec in self.custom.items():
            token = token_losses.evaluate_custom(
                spec, self.ids[at] == index, logp, self.advantages[at], old_logp, token
            )
        loss = token.loss if weight is None else token.loss * weight
        g = token.grad if weight is None else token.grad * weight
        kl = torch.zeros_like(logp)
        if ref_logp is not None:
            kl, kl_grad = token_losses.kl(logp, ref_logp, self.kl_type)
            if self.kl_coef is not None:
                loss, g = loss + self.kl_coef[at] * kl, g + self.kl_coef[at] * kl_grad
        if self.entropy_coef is not None:
            loss = loss - self.entropy_coef[at] * stats.entropy
        return loss, g, kl, token

    def may_matter(self) -> Tensor:
        """[N] bool: rows whose gradient is not known to be zero before the forward pass."""
        needs_no_advantage = self.table[self.ids, 0] >= token_losses.NLL  # nll and custom
        live = (self.advantages != 0) | needs_no_advantage
        live = live if self.weight is None else live & (self.weight != 0)
        for coefficient in (self.entropy_coef, self.kl_coef):
            live = live if coefficient is None else live | (coefficient != 0)
        return live


def sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    losses: Tensor,
    loss_id: Tensor | None,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    token_weight: Tensor | None,
    entropy_coef: Tensor | None,
    kl_coef: Tensor | None,
    kl_type: str,
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
    custom: dict[int, token_losses.TokenLoss] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss sum, logp, entropy, ratio, kl, clipped, dh, dW, db); gradients that `need` does not ask for are empty.

    `custom` holds the losses that no schema can carry, by their index in the table.
    """
    targets, n, dtype = targets.contiguous(), targets.shape[0], advantages.dtype
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    head = _chunks.make_head(OP, weight, bias, temperature, softcap, logit_scale, operand, n, tp_group, vocab_start)
    check_head_values(OP, targets, head.vocabulary, ignore_index, temperature)

    def spread(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(n).contiguous()

    ids = token_losses.table_index(OP, loss_id, losses.shape[0], targets != ignore_index)
    tokens = Tokens(
        torch.cat([losses, losses.new_full((1, losses.shape[1]), torch.nan)]).to(dtype),
        ids,
        advantages.expand(n).contiguous(),
        spread(old_logp),
        spread(ref_logp),
        spread(token_weight),
        spread(entropy_coef),
        spread(kl_coef),
        kl_type,
        custom or {},
    )
    outputs = [targets.new_zeros(n, dtype=dtype) for _ in range(5)] + [targets.new_zeros(n, dtype=torch.bool)]
    grads = _chunks.Gradients(hidden, head, (need[0], need[1], need[2]))
    valid = targets != ignore_index
    live = valid & tokens.may_matter() if any(need) else torch.zeros_like(valid)
    # Rows that need a gradient come first, then those that only need their statistics: no chunk mixes the two.
    groups = [(live.nonzero().view(-1), grads), ((valid & ~live).nonzero().view(-1), None)]
    longest = max(len(rows) for rows, _ in groups)
    work = kernels.workspace(min(kernels.chunk_rows(head, chunk_bytes), longest), head)
    one_pass = getattr(kernels, "policy_rows", None) if not custom and head.shard is None else None
    for group, share in groups:
        for part in _chunks.balanced(len(group), kernels.chunk_rows(head, chunk_bytes, keep=share is not None)):
            if one_pass is None:
                _chunk(hidden, targets, group[part], tokens, head, kernels, work, outputs, share)
            else:
                _fused_chunk(hidden, targets, group[part], tokens, head, one_pass, work, outputs, share)
    loss, logp, entropy, ratio, kl, clipped = outputs
    dh, dw, db = (hidden.new_empty(0) if g is None else g for g in grads.all(head))
    total = loss.sum(dtype=torch.float64).to(loss.dtype)  # torch splits a sum by its threads
    return total, logp, entropy, ratio, kl, clipped, dh, dw, db


def _chunk(
    hidden: Tensor,
    targets: Tensor,
    rows: Tensor,
    tokens: Tokens,
    head: _chunks.Head,
    kernels: _chunks.RowKernels,
    work: Any,
    outputs: list[Tensor],
    grads: _chunks.Gradients | None,
) -> None:
    """One chunk: statistics and loss of these rows, and their share of the gradients."""
    h, y = hidden[rows].to(head.weight.dtype), targets[rows]
    stats = kernels.row_stats(h, rows, y, head, work, keep=grads is not None)
    loss, g, kl, token = tokens.evaluate(rows, stats)
    for out, value in zip(outputs, (loss, stats.logp, stats.entropy, token.ratio, kl, token.clipped), strict=True):
        out[rows] = value
    if grads is not None:
        u = None if tokens.entropy_coef is None else -tokens.entropy_coef[rows]
        kernels.add_grads(stats, rows, y, h, g, u, None, head, work, grads)


def _fused_chunk(
    hidden: Tensor,
    targets: Tensor,
    rows: Tensor,
    tokens: Tokens,
    head: _chunks.Head,
    one_pass: Callable[..., Tensor],
    work: Any,
    outputs: list[Tensor],
    grads: _chunks.Gradients | None,
) -> None:
    """One chunk by row kernels that know the table: they write the outputs and dz themselves."""
    h = hidden[rows].to(head.weight.dtype)
    dz = one_pass(h, rows, targets, tokens, head, work, outputs, grads is not None)
    if grads is not None:
        grads.add(dz, h, rows, head)


def _fake(hidden, weight, bias, targets, losses, loss_id, advantages, *rest):
    dtype = advantages.dtype
    per_row = [targets.new_empty(targets.shape, dtype=dtype) for _ in range(4)]
    grads = _chunks.fake_grads(hidden, weight, dtype, rest[-1])
    return (advantages.new_empty(()), *per_row, targets.new_empty(targets.shape, dtype=torch.bool), *grads)


def _setup(ctx, inputs, output):
    # dh, dW and db are outputs of the operator; zeros must not be materialised for their own unused gradients.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[6:])
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.need = inputs[-1]


def _backward(ctx, grad_loss, *_):
    scaled: list[Tensor | None] = [None] * 3
    if grad_loss is not None:
        for i, saved in enumerate(ctx.saved_tensors):
            if ctx.need[i]:
                scaled[i] = _chunks.scaled(saved, grad_loss, ctx.dtypes[i])
    return (*scaled, *(None,) * 18)


def _register(backend: str) -> None:
    op = _library.define(f"policy_loss_{backend}", sweep, lambda: {"kernels": _library.row_kernels(backend)})
    op.register_fake(_fake)
    op.register_autograd(_backward, setup_context=_setup)
    _library.register(OP, backend, op)


for _backend_name in ("torch", "cpp", "triton"):
    _register(_backend_name)


class CustomPolicyLoss(torch.autograd.Function):
    """The sweep outside torch.library, whose schemas take no callables. First: `custom` and `kernels` of `sweep`."""

    @staticmethod
    def forward(ctx, custom, kernels, *args):
        ctx.set_materialize_grads(False)
        with _library.isolated(args[0]):
            outputs = sweep(*args, kernels=kernels, custom=custom)
        ctx.save_for_backward(*outputs[6:])
        ctx.dtypes = [None if x is None else x.dtype for x in args[:3]]
        ctx.need = args[-1]
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        return (None, None, *_backward(ctx, *grads))
