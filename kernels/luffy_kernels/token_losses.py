"""The table of per-token policy losses: data that every backend reads, and its value and analytic gradient in torch.

    r = exp(logp - old_logp)    p = exp(logp)    q = exp(old_logp)    A = advantage    x = p or r (`ratio`)

    name              loss                    d loss / d logp           zero gradient where
    policy_gradient   max(-A r, -A clip(r))   -A r                      A > 0: r > 1 + clip_high
                                                                        A < 0: r < 1 - clip_low or r > dual_clip
    shaped            -A x / (x + gamma)      -A gamma x / (x+gamma)^2  x outside [x_min, x_max]
    behaviour_ratio   -A p / (q + eps)        -A p / (q + eps)          x outside [x_min, x_max]
    nll               -logp                   -1

`p_max` drops a token (loss and gradient zero) whose p exceeds it, for every kind. A spec holds no callables: it encodes
to one fp32 row, so a table of specs is an ordinary tensor and `loss_id` chooses a row per token.

Sources: PPO (arXiv 1707.06347), dual clip (arXiv 1912.09729), LUFFY's shaping (arXiv 2504.14945, eq. 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

POLICY_GRADIENT, SHAPED, NLL, BEHAVIOUR_RATIO = range(4)
COLUMNS = ("kind", "constant", "old", "clip_low", "clip_high", "dual_clip", "x_min", "x_max", "p_max")


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """One row of the table; build it with a function of this module. Infinite bounds mean "off"."""

    name: str
    kind: int
    constant: float = 0.0  # gamma of `shaped`, eps of `behaviour_ratio`
    old: bool = False  # x is r rather than p
    clip_low: float = math.inf
    clip_high: float = math.inf
    dual_clip: float = math.inf
    x_min: float = -math.inf
    x_max: float = math.inf
    p_max: float = math.inf
    needs_old_logp: bool = field(default=False, compare=False)

    def row(self) -> list[float]:
        """The spec as numbers, in the order of `COLUMNS`."""
        return [float(getattr(self, column)) for column in COLUMNS]


def policy_gradient(
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    *,
    p_max: float | None = None,
) -> TokenLoss:
    """PPO's ratio loss, unclipped by default. Clips are distances from 1; `dual_clip` > 1 bounds r where A < 0."""
    _bound("clip_low", clip_low, 0.0)
    _bound("clip_high", clip_high, 0.0)
    _bound("dual_clip", dual_clip, 1.0)
    return TokenLoss(
        "policy_gradient",
        POLICY_GRADIENT,
        old=True,
        clip_low=_or_inf(clip_low),
        clip_high=_or_inf(clip_high),
        dual_clip=_or_inf(dual_clip),
        p_max=_or_inf(p_max),
        needs_old_logp=True,
    )


def shaped(
    gamma: float = 0.1,
    ratio: Literal["prob", "old"] = "prob",
    *,
    x_min: float | None = None,
    x_max: float | None = None,
    p_max: float | None = None,
) -> TokenLoss:
    """LUFFY's shaping -A x/(x+gamma); x is p ("prob": the teacher's probability is taken as 1) or the ratio ("old")."""
    if not gamma > 0.0:
        raise ValueError(f"shaped: gamma must be positive, got {gamma}")
    if ratio not in ("prob", "old"):
        raise ValueError(f"shaped: ratio must be 'prob' or 'old', got {ratio!r}")
    old = ratio == "old"
    low = -math.inf if x_min is None else x_min
    return TokenLoss(
        "shaped", SHAPED, gamma, old, x_min=low, x_max=_or_inf(x_max), p_max=_or_inf(p_max), needs_old_logp=old
    )


def nll(*, p_max: float | None = None) -> TokenLoss:
    """Negative log-likelihood; ignores advantages (weigh it with `token_weight`)."""
    return TokenLoss("nll", NLL, p_max=_or_inf(p_max))


def behaviour_ratio(
    eps: float = 1e-6, *, x_min: float | None = None, x_max: float | None = None, p_max: float | None = None
) -> TokenLoss:
    """True importance ratio -A p/(q+eps), q = exp(old_logp) the probability under the policy that wrote the token."""
    if not eps >= 0.0:
        raise ValueError(f"behaviour_ratio: eps must be at least 0, got {eps}")
    low = -math.inf if x_min is None else x_min
    return TokenLoss(
        "behaviour_ratio",
        BEHAVIOUR_RATIO,
        eps,
        x_min=low,
        x_max=_or_inf(x_max),
        p_max=_or_inf(p_max),
        needs_old_logp=True,
    )


def encode(losses: TokenLoss | tuple[TokenLoss, ...]) -> Tensor:
    """[n, len(COLUMNS)] float32 table on CPU; row i serves the tokens with loss_id i."""
    rows = (losses,) if isinstance(losses, TokenLoss) else losses
    return torch.tensor([spec.row() for spec in rows], dtype=torch.float32)


def reads_old_logp(kind: Tensor, old: Tensor) -> Tensor:
    """Where the loss is a function of old_logp (elsewhere old_logp may hold anything)."""
    return (old != 0) | (kind == BEHAVIOUR_RATIO)


class Evaluated(NamedTuple):
    loss: Tensor  # [N] unweighted loss
    grad: Tensor  # [N] d loss / d logp
    ratio: Tensor  # [N] r, 1 where the loss does not read old_logp
    clipped: Tensor  # [N] bool, true where a clip or bound made the gradient zero


def evaluate(logp: Tensor, advantages: Tensor, old_logp: Tensor | None, rows: Tensor) -> Evaluated:
    """Value and gradient of every token's loss.

    Args:
        logp, advantages: [N] float. old_logp: [N] or None for "the same as logp" (r = 1).
        rows: [N, len(COLUMNS)], the table's row of each token, in logp's dtype.
    """
    kind, constant, old, clip_low, clip_high, dual_clip, x_min, x_max, p_max = rows.unbind(-1)
    zero = torch.zeros_like(logp)
    p = logp.exp()
    old_logp = logp if old_logp is None else torch.where(reads_old_logp(kind, old), old_logp, logp)
    r = (logp - old_logp).exp()

    x = torch.where(old != 0, r, p)
    inside = x.clamp(x_min, x_max)
    bounded = (x < x_min) | (x > x_max)
    # x / (x + c) and its derivative as products of numbers <= 1, so that neither overflows nor loses x -> inf.
    share = torch.where(inside.isinf(), 1.0, inside / (inside + constant))
    behaviour = inside / (old_logp.exp() + constant)

    up, down = advantages > 0, advantages < 0
    # Distance 1 + inf is inf; 1 - inf is -inf: the infinite defaults switch the clips off without a branch.
    bounded_r = torch.where(up, r.clamp(max=1 + clip_high), torch.minimum(r.clamp(min=1 - clip_low), dual_clip))
    off_side = (up & (r > 1 + clip_high)) | (down & ((r < 1 - clip_low) | (r > dual_clip)))

    is_pg, is_shaped, is_nll = kind == POLICY_GRADIENT, kind == SHAPED, kind == NLL
    clipped = torch.where(is_pg, off_side, bounded & ~is_nll)
    value = torch.where(is_pg, bounded_r, torch.where(is_shaped, share, behaviour))
    slope = torch.where(is_pg, r, torch.where(is_shaped, share * (1 - share), behaviour))

    dropped = p > p_max
    off = (advantages == 0) & ~is_nll  # an exact zero, even where r overflowed
    loss = torch.where(is_nll, -logp, torch.where(off, zero, -advantages * value))
    grad = torch.where(is_nll, -torch.ones_like(logp), torch.where(off | clipped, zero, -advantages * slope))
    clipped = (clipped & ~off) | dropped
    return Evaluated(torch.where(dropped, zero, loss), torch.where(dropped, zero, grad), r, clipped)


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def _bound(name: str, value: float | None, least: float) -> None:
    if value is not None and not value > least:
        raise ValueError(f"policy_gradient: {name} must be greater than {least}, got {value}")
