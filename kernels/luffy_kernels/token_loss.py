"""Per-token policy losses of log-probs that are already there: no head, no GEMM, differentiable in logp.

For losses of whole sequences (aggregate what comes back as you like), and for frameworks that compute log-probs of
their own. The same table serves the fused operators (`token_losses`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import token_losses
from ._checks import check_kl, check_losses, per_token, require
from ._native import NAMESPACE

OP = "token_loss"


class TokenLosses(NamedTuple):
    """[...] in logp's shape and dtype. `loss` carries the gradient, the rest is detached."""

    loss: Tensor
    """token_weight * loss + kl_coef * kl."""
    ratio: Tensor
    """exp(logp - old_logp); 1 where the token's loss does not read old_logp."""
    kl: Tensor
    """Before kl_coef; 0 without ref_logp."""
    clipped: Tensor
    """bool: a clip or bound made the token's gradient zero."""


def token_loss(
    logp: Tensor,
    *,
    advantages: Tensor | float,
    losses: token_losses.TokenLoss | tuple[token_losses.TokenLoss, ...],
    loss_id: Tensor | None = None,
    old_logp: Tensor | Literal["current"] | None = None,
    ref_logp: Tensor | None = None,
    token_weight: Tensor | float | None = None,
    kl_coef: float | Tensor = 0.0,
    kl_type: Literal["k1", "k2", "k3"] = "k3",
) -> TokenLosses:
    """Losses of tokens by their log-probs; nothing is masked and nothing is summed.

    Args:
        logp: [...] float32 or float64, nats.
        advantages: number or tensor that broadcasts to logp, with as many dimensions.
        losses: one `TokenLoss`, or a tuple of them.
        loss_id: [...] integer, logp's shape: of each token, which of `losses`.
        old_logp: tensor like advantages, nats, or "current" for logp itself.
        ref_logp: tensor like advantages, nats, for the KL term.
        token_weight: number or tensor like advantages, multiplies the policy term only.
        kl_coef: number or tensor like advantages, per nat.
        kl_type: as in `linear_policy_loss`.

    Returns:
        TokenLosses.

    Raises:
        ValueError: losses without the `loss_id` or the `old_logp` that they need, a KL term without `ref_logp`, shapes
            that do not broadcast, another dtype of logp; on CPU also a `loss_id` outside the table.
    """
    require(isinstance(logp, Tensor), OP, "logp", "a tensor", type(logp).__name__)
    require(logp.dtype in (torch.float32, torch.float64), OP, "logp", "float32 or float64", logp.dtype)
    specs = check_losses(OP, losses, loss_id, old_logp, logp)
    check_kl(OP, kl_type, kl_coef, ref_logp)

    def token(name: str, value: float | Tensor) -> Tensor:
        return per_token(OP, name, value, logp, logp.dtype).expand(logp.numel())

    flat, ids = logp.reshape(-1), None if loss_id is None else loss_id.reshape(-1)
    a = token("advantages", advantages)
    old = None if old_logp is None or isinstance(old_logp, str) else token("old_logp", old_logp)
    weights = None if token_weight is None else token("token_weight", token_weight)
    loss, ratio, kl, clipped, _ = token_loss_torch(
        flat,
        a,
        old,
        None if ref_logp is None else token("ref_logp", ref_logp),
        weights,
        token("kl_coef", kl_coef),
        token_losses.encode(specs).to(logp.device),
        ids,
        kl_type,
    )
    for index, spec in enumerate(specs):
        if spec.fn is not None:  # plain autograd: there is nothing to fuse
            mine = torch.ones_like(flat, dtype=torch.bool) if ids is None else ids == index
            given = flat.detach() if old is None or not spec.needs_old_logp else old
            value = spec.fn(flat, given, a)
            loss = loss + torch.where(mine, value if weights is None else weights * value, 0.0)
            ratio = torch.where(mine, token_losses.bounded_ratio(flat.detach(), given), ratio)
    return TokenLosses(*(x.view(logp.shape) for x in (loss, ratio.detach(), kl.detach(), clipped.detach())))


@torch.library.custom_op(f"{NAMESPACE}::token_loss_torch", mutates_args=())
def token_loss_torch(
    logp: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    token_weight: Tensor | None,
    kl_coef: Tensor,
    losses: Tensor,
    loss_id: Tensor | None,
    kl_type: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, ratio, kl, clipped, d loss / d logp), [N] each."""
    ids = token_losses.table_index(OP, loss_id, losses.shape[0], torch.ones_like(logp, dtype=torch.bool))
    table = torch.cat([losses, losses.new_full((1, losses.shape[1]), torch.nan)]).to(logp.dtype)
    token = token_losses.evaluate(logp, advantages, old_logp, table[ids])
    loss = token.loss if token_weight is None else token.loss * token_weight
    grad = token.grad if token_weight is None else token.grad * token_weight
    kl = torch.zeros_like(logp)
    if ref_logp is not None:
        kl, slope = token_losses.kl(logp, ref_logp, kl_type)
        loss, grad = loss + kl_coef * kl, grad + kl_coef * slope
    return loss, token.ratio.clone(), kl.clone(), token.clipped, grad


@token_loss_torch.register_fake
def _fake(logp, *_):
    per_row = [torch.empty_like(logp) for _ in range(4)]
    return (*per_row[:3], torch.empty_like(logp, dtype=torch.bool), per_row[3])


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[4])


def _backward(ctx, grad_loss, *_):
    (slope,) = ctx.saved_tensors
    return (None if grad_loss is None else slope * grad_loss, *(None,) * 8)


token_loss_torch.register_autograd(_backward, setup_context=_setup)
