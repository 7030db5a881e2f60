"""The operator behind `linear_policy_loss`, torch backend: one sweep over chunks gives the loss and its gradients.

A row's coefficients g = dL/dlogp and u = dL/dentropy are known as soon as its statistics are, so each chunk runs GEMM,
row arithmetic, two GEMMs, and is forgotten. The loss is summed, not divided: the normaliser would flush small fp16
gradients to zero, so it is applied to the fp32 sum and, through the chain rule, when backward scales what was saved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _chunks, token_losses
from ._checks import check_head_values

OP = "linear_policy_loss"


class _Tokens(NamedTuple):
    """Per-token inputs of a sweep, [N] each."""

    rows: Tensor  # [N, columns] of the loss table
    advantages: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    weight: Tensor | None
    entropy_coef: Tensor | None
    kl_coef: Tensor | None
    kl_type: str
    ids: Tensor  # [N] index into the table
    custom: dict[int, token_losses.TokenLoss]  # by that index

    def evaluate(self, at: Tensor, stats: _chunks.Stats) -> tuple[Tensor, Tensor, Tensor, token_losses.Evaluated]:
        """Weighted loss incl. KL and entropy, its derivative in logp, the KL, and the bare token loss."""
        logp = stats.logp
        cut = [None if x is None else x[at] for x in (self.old_logp, self.ref_logp, self.weight)]
        old_logp, ref_logp, weight = cut
        token = token_losses.evaluate(logp, self.advantages[at], old_logp, self.rows[at])
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
        live = (self.advantages != 0) | (self.rows[:, 0] >= token_losses.NLL)  # nll and custom need no advantage
        live = live if self.weight is None else live & (self.weight != 0)
        for coefficient in (self.entropy_coef, self.kl_coef):
            live = live if coefficient is None else live | (coefficient != 0)
        return live


@torch.library.custom_op("luffy_kernels::policy_loss_torch", mutates_args=())
def policy_loss_torch(
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
    chunk_bytes: int,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss sum, logp, entropy, ratio, kl, clipped, dh, dW, db); gradients that `need` does not ask for are empty."""
    return sweep(
        hidden,
        weight,
        bias,
        targets,
        losses,
        loss_id,
        advantages,
        old_logp,
        ref_logp,
        token_weight,
        entropy_coef,
        kl_coef,
        kl_type,
        temperature,
        softcap,
        logit_scale,
        ignore_index,
        chunk_bytes,
        need,
    )


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
    chunk_bytes: int,
    need: list[bool],
    *,
    custom: dict[int, token_losses.TokenLoss] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator, plus the `custom` losses that no schema can carry, by their index in the table."""
    n, dtype = targets.shape[0], advantages.dtype
    check_head_values(OP, targets, weight.shape[0], ignore_index, temperature)
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    head = _chunks.make_head(weight, bias, temperature, softcap, logit_scale, operand, n)

    def spread(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(n)

    ids = token_losses.table_index(OP, loss_id, losses.shape[0], targets != ignore_index)
    tokens = _Tokens(
        losses.to(dtype)[ids],
        advantages.expand(n),
        spread(old_logp),
        spread(ref_logp),
        spread(token_weight),
        spread(entropy_coef),
        spread(kl_coef),
        kl_type,
        ids,
        custom or {},
    )
    outputs = [targets.new_zeros(n, dtype=dtype) for _ in range(5)] + [targets.new_zeros(n, dtype=torch.bool)]
    grads = _chunks.Gradients(hidden, head, (need[0], need[1], need[2]))
    valid = targets != ignore_index
    live = valid & tokens.may_matter() if any(need) else torch.zeros_like(valid)
    # Rows that need a gradient come first, then those that only need their statistics: no chunk mixes the two.
    most = _chunks.chunk_rows(head, chunk_bytes)
    groups = [(live.nonzero().view(-1), True), ((valid & ~live).nonzero().view(-1), False)]
    work = _chunks.Workspace(min(most, max(len(rows) for rows, _ in groups)), head)
    for group, backward in groups:
        for part in _chunks.balanced(len(group), most):
            _sweep(hidden, targets, group[part], tokens, head, work, outputs, grads if backward else None)
    loss, logp, entropy, ratio, kl, clipped = outputs
    dh, dw, db = (hidden.new_empty(0) if g is None else g for g in grads.all())
    return loss.sum(), logp, entropy, ratio, kl, clipped, dh, dw, db


def _sweep(
    hidden: Tensor,
    targets: Tensor,
    rows: Tensor,
    tokens: _Tokens,
    head: _chunks.Head,
    work: _chunks.Workspace,
    outputs: list[Tensor],
    grads: _chunks.Gradients | None,
) -> None:
    """One chunk: statistics and loss of these rows, and their share of the gradients."""
    h, y = hidden[rows].to(head.weight.dtype), targets[rows]
    stats = _chunks.row_stats(h, rows, y, head, work)
    loss, g, kl, token = tokens.evaluate(rows, stats)
    for out, value in zip(outputs, (loss, stats.logp, stats.entropy, token.ratio, kl, token.clipped), strict=True):
        out[rows] = value
    if grads is None:
        return
    u = None if tokens.entropy_coef is None else -tokens.entropy_coef[rows]
    dz = _chunks.logits_grad(stats, rows, y, g, u, None, head, work)
    if h.device.type == "cpu":  # elsewhere the count would be a synchronisation per chunk
        keep = ((g != 0) if u is None else (g != 0) | (u != 0)).nonzero().view(-1)
        if len(keep) < len(rows):
            dz = torch.index_select(dz, 0, keep, out=work.spare(len(keep), dz.dtype))
            h, rows = h[keep], rows[keep]
    grads.add(dz, h, rows, head)


@policy_loss_torch.register_fake
def _fake(hidden, weight, bias, targets, losses, loss_id, advantages, *rest):
    need, dtype = rest[-1], advantages.dtype
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    per_row = [targets.new_empty(targets.shape, dtype=dtype) for _ in range(4)]
    grads = (
        hidden.new_empty(hidden.shape if need[0] else (0,), dtype=operand if need[0] else None),
        weight.new_empty(weight.shape, dtype=dtype) if need[1] else hidden.new_empty(0),
        weight.new_empty(weight.shape[0], dtype=dtype) if need[2] else hidden.new_empty(0),
    )
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
            if ctx.need[i]:  # out of place, so that a second backward finds the saved gradient as it was
                scaled[i] = (saved * grad_loss.to(saved.device)).to(ctx.dtypes[i])
    return (*scaled, *(None,) * 16)


policy_loss_torch.register_autograd(_backward, setup_context=_setup)


class CustomPolicyLoss(torch.autograd.Function):
    """The same sweep outside torch.library, whose schemas take no callables. First argument: `custom` of `sweep`."""

    @staticmethod
    def forward(ctx, custom, *args):
        ctx.set_materialize_grads(False)
        outputs = sweep(*args, custom=custom)
        ctx.save_for_backward(*outputs[6:])
        ctx.dtypes = [None if x is None else x.dtype for x in args[:3]]
        ctx.need = args[-1]
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        return (None, *_backward(ctx, *grads))
