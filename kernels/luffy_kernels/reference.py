"""Every operator in plain autograd torch, in any dtype up to float64: the specification, and the oracle of the tests.

Stores all logits. N tokens, H hidden, V vocabulary; leading dimensions are free. Arguments as in the fused operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .logprobs import LogProbs
from .policy_loss import PolicyLoss
from .token_losses import (
    BEHAVIOUR_RATIO,
    CISPO,
    MAX_LOG_RATIO,
    NLL,
    POWER,
    PROB_PLUS_LOG,
    SAPO,
    SHAPED,
    SHAPED_RELATIVE,
    TokenLoss,
)


def logits(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """z [..., V] and which rows are valid, [...]. Arguments as in `luffy_kernels.linear_logprobs`."""
    valid = targets != ignore_index
    # Cut ignored rows off before the product: 0 * NaN would carry their junk into the weight's gradient.
    z = torch.where(valid[..., None], hidden, 0.0) @ weight.T
    z = logit_scale * (z if bias is None else z + bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (temperature[..., None] if isinstance(temperature, Tensor) and temperature.ndim else temperature)
    if bias is not None:
        z = torch.where(bias == -torch.inf, -torch.inf, z)  # masked, whatever the cap
    return z, valid


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
) -> LogProbs:
    """As `luffy_kernels.linear_logprobs` with the entropy, [...] each."""
    z, valid = logits(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
    )
    lse = z.logsumexp(-1)
    logp = z.gather(-1, torch.where(valid, targets, 0)[..., None])[..., 0] - lse
    log_p = z - lse[..., None]
    entropy = -(log_p.exp() * log_p.clamp(min=torch.finfo(z.dtype).min)).sum(-1)
    gap = (logp + lse - z.amax(-1)).detach()
    return LogProbs(*(torch.where(valid, x, 0.0) for x in (logp, entropy, lse, gap)))


def one_loss(spec: TokenLoss, logp: Tensor, advantages: Tensor, old_logp: Tensor) -> Tensor:
    """The loss of tokens under one spec, [...] like logp (nats), advantages and old_logp; differentiable in logp."""
    if spec.fn is not None:
        loss = spec.fn(logp, old_logp, advantages)
        return torch.where(logp.exp() > spec.p_max, 0.0, loss)
    p, q, a, c, w = logp.exp(), old_logp.exp(), advantages, spec.constant, spec.second
    r = (logp - old_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    x = (r if spec.old else p).clamp(spec.x_min, spec.x_max)
    if spec.kind == NLL:
        loss = -logp
    elif spec.kind == CISPO:
        loss = -a * r.detach().clamp(max=c) * logp
    elif spec.kind == SAPO:
        tau = torch.where(a > 0, c, w)
        loss = -a * 4 * torch.sigmoid(tau * (r - 1)) / tau
    else:
        u = {
            POWER: lambda: x**c,
            SHAPED: lambda: x / (x + c),
            SHAPED_RELATIVE: lambda: (p / (p + c)) / (q / (q + c)),
            PROB_PLUS_LOG: lambda: c * x + w * x.log(),
            BEHAVIOUR_RATIO: lambda: x / (q + c),
        }[spec.kind]()
        loss = torch.maximum(-a * u, -a * u.clamp(1 - spec.clip_low, 1 + spec.clip_high))
        loss = torch.where(a < 0, torch.minimum(loss, -a * spec.dual_clip), loss)
    return torch.where(p > spec.p_max, 0.0, loss)


def token_loss(
    logp: Tensor,
    *,
    advantages: Tensor,
    losses: TokenLoss | tuple[TokenLoss, ...],
    loss_id: Tensor | None = None,
    old_logp: Tensor | str | None = None,
) -> Tensor:
    """The loss, as `luffy_kernels.token_loss` without a weight and a KL term; per-token arguments [...] like logp."""
    specs = (losses,) if isinstance(losses, TokenLoss) else losses
    loss_id = torch.zeros_like(logp, dtype=torch.int64) if loss_id is None else loss_id
    given = old_logp if isinstance(old_logp, Tensor) else logp.detach()
    reads = torch.stack([torch.full_like(logp, spec.needs_old_logp, dtype=torch.bool) for spec in specs])
    old = torch.where(reads.gather(0, loss_id[None])[0], given, logp.detach())
    return torch.stack([one_loss(spec, logp, advantages, old) for spec in specs]).gather(0, loss_id[None])[0]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    **head,
) -> Tensor:
    """[] or [...], as `luffy_kernels.linear_cross_entropy`."""
    z, valid = logits(hidden, weight, targets, ignore_index=ignore_index, **head)
    lse = z.logsumexp(-1)
    nll = lse - z.gather(-1, torch.where(valid, targets, 0)[..., None])[..., 0]
    smooth = lse - z.mean(-1)
    loss = (1 - label_smoothing) * nll + (label_smoothing * smooth if label_smoothing else 0.0) + z_loss * lse.square()
    loss = torch.where(valid, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / (1 if reduction == "sum" else valid.sum() if normalizer is None else normalizer)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kl_type: str) -> Tensor:
    """[...], k1, k2 or k3 in nats of log-probs [...]; see `luffy_kernels.linear_policy_loss`."""
    d = logp - ref_logp
    return {"k1": d, "k2": d.square() / 2, "k3": (-d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).exp() + d - 1}[kl_type]


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    advantages: Tensor,
    losses: TokenLoss | tuple[TokenLoss, ...],
    loss_id: Tensor | None = None,
    old_logp: Tensor | str | None = None,
    ref_logp: Tensor | None = None,
    token_weight: Tensor | float = 1.0,
    normalizer: float | Tensor,
    entropy_coef: float | Tensor = 0.0,
    kl_coef: float | Tensor = 0.0,
    kl_type: str = "k3",
    ignore_index: int = -100,
    **head,
) -> PolicyLoss:
    """As `luffy_kernels.linear_policy_loss`, with per-token arguments in targets' shape, [...]."""
    logp, entropy, *_ = linear_logprobs(hidden, weight, targets, ignore_index=ignore_index, **head)
    assert entropy is not None, "the reference always computes the entropy"
    specs = (losses,) if isinstance(losses, TokenLoss) else losses
    loss_id = torch.zeros_like(targets) if loss_id is None else loss_id
    loss = token_loss(logp, advantages=advantages, losses=specs, loss_id=loss_id, old_logp=old_logp)
    slope = torch.autograd.grad(loss.sum(), logp, retain_graph=True)[0] if logp.requires_grad else None
    kl = torch.zeros_like(logp) if ref_logp is None else kl_estimate(logp, ref_logp, kl_type)
    valid = targets != ignore_index
    total = torch.where(valid, token_weight * loss + kl_coef * kl - entropy_coef * entropy, 0.0).sum() / normalizer
    clipped = torch.zeros_like(valid) if slope is None else valid & (slope == 0) & (advantages != 0)
    reads = torch.stack([torch.full_like(valid, spec.needs_old_logp) for spec in specs]).gather(0, loss_id[None])[0]
    log_ratio = torch.where(reads, logp - old_logp, 0.0) if isinstance(old_logp, Tensor) else torch.zeros_like(logp)
    ratio = torch.where(valid, log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), 0.0)
    return PolicyLoss(total, *(x.detach() for x in (logp, entropy, ratio, torch.where(valid, kl, 0.0), clipped)))
