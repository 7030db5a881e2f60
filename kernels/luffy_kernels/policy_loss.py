"""Policy loss of a linear head in 3 GEMMs: no [N, V] logits, no second forward, exact skipping of rows.

    z    = softcap(logit_scale * (hidden W^T + bias)) / temperature        [N, V], a chunk at a time, fp32
    logp = z[target] - logsumexp z     ent = -sum_v p_v log p_v             p = softmax z
    loss = sum_t (token_weight_t loss_t + kl_coef_t kl_t - entropy_coef_t ent_t) / normalizer

Advantages and old log-probs are known before the forward pass, so d loss / d logp is known as soon as a chunk's logits
are: the sweep that computes the loss computes both gradients, and backward only scales them. N tokens, H hidden, V
vocabulary. Ignored rows enter no GEMM; rows whose coefficients are known to be zero (advantage 0) only the first, and
with `torch` on CPU also those that turn out zero (clipped).

Memory: `chunk_bytes` for the [C, V] buffers (`chunk_rows` of the backend), dW in fp32, dh in the operands' dtype; with
`torch` on CPU a 16-bit weight is widened once (4 V H bytes). Deterministic. Do not place the head inside a checkpointed
region: it would run twice.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _chunks, _library, _vocab, token_losses
from ._checks import check_head, check_kl, check_losses, check_transform, checked_normalizer, per_token
from ._policy_sweep import OP, CustomPolicyLoss
from .logprobs import LogProbs, linear_logprobs
from .token_loss import token_loss


class PolicyLoss(NamedTuple):
    """`loss` carries the gradient; the rest is detached, per token, [...] in targets' shape, 0 in ignored rows. float32
    (float64 for float64 operands)."""

    loss: Tensor
    """[] float32 (float64 for float64 operands)."""
    logp: Tensor
    """Log-probability of the target, nats."""
    entropy: Tensor
    """Nats."""
    ratio: Tensor
    """exp(logp - old_logp); 1 where the token's loss does not read old_logp."""
    kl: Tensor
    """kl_t, before kl_coef; 0 without ref_logp."""
    clipped: Tensor
    """bool: a clip or bound made the token's gradient zero."""


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    advantages: Tensor | float,
    losses: token_losses.TokenLoss | tuple[token_losses.TokenLoss, ...],
    loss_id: Tensor | None = None,
    old_logp: Tensor | Literal["current"] | None = None,
    ref_logp: Tensor | None = None,
    token_weight: Tensor | float | None = None,
    normalizer: float | Tensor,
    entropy_coef: float | Tensor = 0.0,
    kl_coef: float | Tensor = 0.0,
    kl_type: Literal["k1", "k2", "k3"] = "k3",
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    tp_group: ProcessGroup | None = None,
    vocab_start: int = 0,
    chunk_bytes: int | None = None,
    backend: Literal["auto", "torch", "cpp", "triton"] = "auto",
) -> PolicyLoss:
    """Sum of token losses over valid rows, divided by `normalizer`; differentiable in hidden, weight and bias.

    `linear_logprobs` says more of the arguments that it has too.

    Args:
        hidden: [..., H] float.
        weight: [V, H] float.
        targets: [...] int64.
        advantages: number or tensor that broadcasts to targets, with as many dimensions ([B, 1] for per-sequence ones).
        losses: one `TokenLoss`, or a tuple of them.
        loss_id: [...] integer, targets' shape: of each token, which of `losses`.
        old_logp: tensor like advantages, nats, or "current" for this pass's own log-probs (ratio 1). Read only where a
            token's loss is a function of it; elsewhere it may hold anything.
        ref_logp: tensor like advantages, nats, for the KL term.
        token_weight: number or tensor like advantages, multiplies the policy term only.
        normalizer: positive number or 0-d tensor; nothing else is divided by (no token mean, no row mean).
        entropy_coef: number, 0-d or per-token tensor, per nat.
        kl_coef: likewise.
        kl_type: estimate of KL(policy || reference), with d = logp - ref_logp: k1 = d, k2 = d^2/2, k3 = exp(-d) + d - 1
            (the names of Schulman, "Approximating KL divergence", 2020).
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
        PolicyLoss. Gradients have the inputs' dtypes; none is computed under no_grad or for inputs that need none.

    Raises:
        ValueError: as `linear_logprobs`; losses without the `loss_id` or the `old_logp` that they need, a KL term
            without `ref_logp`, a normaliser that is not positive; on CPU also a `loss_id` outside the table.
    """
    check_head(OP, hidden, weight, targets, bias)
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    dtype = _chunks.compute_dtype(operand)
    specs = check_losses(OP, losses, loss_id, old_logp, targets)
    check_kl(OP, kl_type, kl_coef, ref_logp)
    check_transform(OP, softcap, logit_scale)
    chunk_bytes = _library.chunk_budget(OP, chunk_bytes, hidden.device)

    def token(name: str, value: float | Tensor | None) -> Tensor | None:
        return None if value is None else per_token(OP, name, value, targets, dtype)

    def coefficient(name: str, value: float | Tensor) -> Tensor | None:
        return None if isinstance(value, (int, float)) and value == 0.0 else per_token(OP, name, value, targets, dtype)

    grad = torch.is_grad_enabled()
    group = _vocab.group_name(OP, tp_group)
    chosen = _library.resolve(OP, backend, hidden.device, operand, group is not None)
    op = _library.implementation(OP, chosen)
    custom = {index: spec for index, spec in enumerate(specs) if spec.fn is not None}
    if custom and torch.compiler.is_compiling():
        head: dict[str, Any] = {
            "bias": bias,
            "temperature": temperature,
            "softcap": softcap,
            "logit_scale": logit_scale,
        }
        head |= {"ignore_index": ignore_index, "tp_group": tp_group, "vocab_start": vocab_start}
        terms: dict[str, Any] = {"advantages": advantages, "losses": losses, "loss_id": loss_id, "old_logp": old_logp}
        terms |= {"ref_logp": ref_logp, "token_weight": token_weight, "kl_coef": kl_coef, "kl_type": kl_type}
        found = linear_logprobs(
            hidden, weight, targets, return_entropy=True, chunk_bytes=chunk_bytes, backend=backend, **head
        )
        scale = checked_normalizer(OP, normalizer, hidden.device, dtype)
        return _composed(found, targets != ignore_index, entropy_coef, scale, terms)
    if custom:
        op = functools.partial(CustomPolicyLoss.apply, custom, _library.row_kernels(chosen))
    total, logp, entropy, ratio, kl, clipped, *_ = op(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        token_losses.encode(specs).to(hidden.device),
        None if loss_id is None else loss_id.reshape(-1),
        per_token(OP, "advantages", advantages, targets, dtype),
        token("old_logp", None if isinstance(old_logp, str) else old_logp),
        token("ref_logp", ref_logp),
        token("token_weight", token_weight),
        coefficient("entropy_coef", entropy_coef),
        coefficient("kl_coef", kl_coef),
        kl_type,
        per_token(OP, "temperature", temperature, targets, dtype),
        softcap,
        logit_scale,
        ignore_index,
        group,
        vocab_start,
        chunk_bytes,
        [
            grad and hidden.requires_grad,
            grad and weight.requires_grad,
            grad and bias is not None and bias.requires_grad,
        ],
    )
    shape = targets.shape
    per_row = (x.detach().view(shape) for x in (logp, entropy, ratio, kl, clipped))
    return PolicyLoss(total / checked_normalizer(OP, normalizer, hidden.device, dtype), *per_row)


def _composed(
    found: LogProbs, valid: Tensor, entropy_coef: float | Tensor, normalizer: Tensor, terms: dict[str, Any]
) -> PolicyLoss:
    """The loss from differentiable log-probs, 4 GEMMs: torch.compile traces this where a custom loss is a callable."""
    assert found.entropy is not None, "the entropy was asked for"
    if terms["loss_id"] is not None:
        terms["loss_id"] = torch.where(valid, terms["loss_id"], 0)
    each = token_loss(found.logp, **terms)
    # Ignored rows are cut out before they are summed: their per-token arguments may hold anything.
    total = torch.where(valid, each.loss - entropy_coef * found.entropy, 0.0).sum() / normalizer
    ratio, kl = (torch.where(valid, x, 0.0) for x in (each.ratio, each.kl))
    return PolicyLoss(total, found.logp.detach(), found.entropy.detach(), ratio, kl, each.clipped & valid)
