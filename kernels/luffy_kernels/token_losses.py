"""The table of per-token policy losses: data that every backend reads, and its value and analytic gradient in torch.

    r = exp(logp - old_logp)    p = exp(logp)    q = exp(old_logp)    A = advantage    x = p or r (`ratio`)

    a surrogate u(x) with loss max(-A u, -A clip(u, 1 - clip_low, 1 + clip_high)), where A < 0 at most -A dual_clip:

    name              u                            du / d logp
    policy_gradient   r                            r
    power             x^a                          a x^a
    shaped            x / (x + gamma)              gamma x / (x + gamma)^2
    shaped_relative   f(p) / f(q), f = shaped      u gamma / (p + gamma)
    log_prob          w log x                      w
    prob_plus_log     x + w log x                  x + w
    behaviour_ratio   p / (q + eps)                p / (q + eps)

    and losses that are not of that form:

    name              loss                         d loss / d logp
    reinforce         -A logp                      -A
    cispo             -A sg(min(r, 1 + clip_high)) logp       -A min(r, 1 + clip_high)
    sapo              -A 4 sigmoid(tau (r - 1)) / tau         -A 4 s (1 - s) r, s the sigmoid; tau by the sign of A
    nll               -logp                        -1
    custom            anything                     by autograd

`x_min` and `x_max` clamp x (zero gradient outside); `p_max` drops a token (loss and gradient zero) whose p exceeds it,
for every kind. All but `custom` encode to one fp32 row, so a table of specs is an ordinary tensor and `loss_id` chooses
a row per token.

Sources are with the functions. "LUFFY's code" is that of arXiv 2504.14945.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

POWER, SHAPED, SHAPED_RELATIVE, PROB_PLUS_LOG, BEHAVIOUR_RATIO, CISPO, SAPO, NLL, CUSTOM = range(9)
COLUMNS = ("kind", "constant", "second", "old", "clip_low", "clip_high", "dual_clip", "x_min", "x_max", "p_max")
# A ratio beyond e^20 is a broken sampler, not information: the exponent is clamped, and products stay finite in fp32.
MAX_LOG_RATIO = 20.0

Ratio = Literal["prob", "old"]
CustomLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """One row of the table; build it with a function of this module. Infinite bounds mean "off"."""

    name: str
    kind: int
    constant: float = 0.0  # gamma, eps, the exponent a, tau for A > 0
    second: float = 0.0  # the weight w of the logarithm, tau for A <= 0
    old: bool = False  # x is r rather than p
    clip_low: float = math.inf  # distance below 1 from which u is clipped, where A < 0
    clip_high: float = math.inf  # distance above 1, where A > 0
    dual_clip: float = math.inf  # most that u counts for where A < 0
    x_min: float = -math.inf  # x is held within these, with zero gradient outside
    x_max: float = math.inf
    p_max: float = math.inf  # tokens whose probability exceeds it are dropped: loss and gradient 0
    needs_old_logp: bool = field(default=False, compare=False)
    fn: CustomLoss | None = None  # of `custom` alone

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
    """PPO's ratio loss max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) (arXiv 1707.06347, eq. 7).

    clip_low, clip_high: positive distances from 1; None, the default, does not clip. dual_clip: above 1, the most that
    r counts for where A < 0 (arXiv 1912.09729, eq. 5). p_max: as in `TokenLoss`.

    Raises:
        ValueError: a clip that is not positive, a dual_clip of 1 or less.
    """
    return _surrogate("policy_gradient", POWER, 1.0, ratio="old", clips=(clip_low, clip_high, dual_clip), p_max=p_max)


def reinforce(*, p_max: float | None = None) -> TokenLoss:
    """-A logp: no ratio at all. By their advantages also RLOO (arXiv 2402.14740) and AsymRE (arXiv 2506.20520).

    p_max: as in `TokenLoss`.
    """
    return _surrogate("reinforce", PROB_PLUS_LOG, 0.0, second=1.0, p_max=p_max)


def shaped(
    gamma: float = 0.1,
    ratio: Ratio = "prob",
    *,
    clip_low: float | None = None,
    clip_high: float | None = None,
    x_min: float | None = None,
    x_max: float | None = None,
    p_max: float | None = None,
) -> TokenLoss:
    """LUFFY's shaping -A x / (x + gamma) (arXiv 2504.14945, eq. 6).

    gamma: positive. ratio: x is p ("prob": the teacher's probability is taken as 1) or r ("old"). clip_low, clip_high:
    of the shaped x, as in `policy_gradient`. x_min, x_max, p_max: as in `TokenLoss`.

    Raises:
        ValueError: a gamma or a clip that is not positive, an unknown ratio.
    """
    _positive("shaped", "gamma", gamma)
    return _surrogate(
        "shaped", SHAPED, gamma, ratio=ratio, clips=(clip_low, clip_high, None), x=(x_min, x_max), p_max=p_max
    )


def shaped_relative(
    gamma: float = 0.1, clip_low: float | None = None, clip_high: float | None = None, *, p_max: float | None = None
) -> TokenLoss:
    """-A f(p) / f(q) with f(p) = p / (p + gamma) and q = exp(old_logp): the on-policy ratio reshaped, an option of
    LUFFY's code (arXiv 2504.14945).

    gamma: positive. Clips: as in `policy_gradient`. p_max: as in `TokenLoss`.

    Raises:
        ValueError: a gamma or a clip that is not positive.
    """
    _positive("shaped_relative", "gamma", gamma)
    return _surrogate(
        "shaped_relative", SHAPED_RELATIVE, gamma, clips=(clip_low, clip_high, None), p_max=p_max, needs_old_logp=True
    )


def power(
    exponent: float,
    ratio: Ratio = "prob",
    clip_low: float | None = None,
    clip_high: float | None = None,
    *,
    x_min: float | None = None,
    x_max: float | None = None,
    p_max: float | None = None,
) -> TokenLoss:
    """-A x^a; a = 1/2 is `square_root` of LUFFY's code (arXiv 2504.14945).

    exponent: a, positive. Options: as in `shaped`.

    Raises:
        ValueError: an exponent or a clip that is not positive, an unknown ratio.
    """
    _positive("power", "exponent", exponent)
    return _surrogate(
        "power", POWER, exponent, ratio=ratio, clips=(clip_low, clip_high, None), x=(x_min, x_max), p_max=p_max
    )


def log_prob(
    weight: float = 1.0,
    ratio: Ratio = "prob",
    clip_low: float | None = None,
    clip_high: float | None = None,
    *,
    x_min: float | None = None,
    x_max: float | None = None,
    p_max: float | None = None,
) -> TokenLoss:
    """-A w log x: `logp` of LUFFY's code (arXiv 2504.14945).

    weight: w. Options: as in `shaped`; clips are of w log x.

    Raises:
        ValueError: a clip that is not positive, an unknown ratio.
    """
    return _surrogate(
        "log_prob",
        PROB_PLUS_LOG,
        0.0,
        second=weight,
        ratio=ratio,
        clips=(clip_low, clip_high, None),
        x=(x_min, x_max),
        p_max=p_max,
    )


def prob_plus_log(
    weight: float = 0.1,
    ratio: Ratio = "prob",
    clip_low: float | None = None,
    clip_high: float | None = None,
    *,
    x_min: float | None = None,
    x_max: float | None = None,
    p_max: float | None = None,
) -> TokenLoss:
    """-A (x + w log x): `p_logp` of LUFFY's code (arXiv 2504.14945).

    weight: w. Options: as in `shaped`; clips are of the sum.

    Raises:
        ValueError: a clip that is not positive, an unknown ratio.
    """
    return _surrogate(
        "prob_plus_log",
        PROB_PLUS_LOG,
        1.0,
        second=weight,
        ratio=ratio,
        clips=(clip_low, clip_high, None),
        x=(x_min, x_max),
        p_max=p_max,
    )


def behaviour_ratio(
    eps: float = 1e-6, *, x_min: float | None = None, x_max: float | None = None, p_max: float | None = None
) -> TokenLoss:
    """The true importance ratio -A p / (q + eps), q = exp(old_logp) the probability under the policy that wrote the
    token: what arXiv 2504.14945 has before it takes q as 1.

    eps: at least 0. Bounds are of p, as in `TokenLoss`.

    Raises:
        ValueError: a negative eps.
    """
    if not eps >= 0.0:
        raise ValueError(f"behaviour_ratio: eps must be at least 0, got {eps}")
    return _surrogate("behaviour_ratio", BEHAVIOUR_RATIO, eps, x=(x_min, x_max), p_max=p_max, needs_old_logp=True)


def cispo(clip_high: float = 0.28, *, p_max: float | None = None) -> TokenLoss:
    """-A sg(min(r, 1 + clip_high)) logp: the ratio is a truncated weight, and no token loses its gradient (arXiv
    2506.13585, eq. 4).

    p_max: as in `TokenLoss`.

    Raises:
        ValueError: a clip_high that is not positive.
    """
    _positive("cispo", "clip_high", clip_high)
    return TokenLoss("cispo", CISPO, constant=1 + clip_high, old=True, p_max=_or(p_max, math.inf), needs_old_logp=True)


def sapo(tau_positive: float = 1.0, tau_negative: float = 1.05, *, p_max: float | None = None) -> TokenLoss:
    """-A 4 sigmoid(tau (r - 1)) / tau: a soft gate in place of the clip (arXiv 2511.20347).

    tau_positive, tau_negative: tau where A > 0 and elsewhere. p_max: as in `TokenLoss`.

    Raises:
        ValueError: a tau that is not positive.
    """
    _positive("sapo", "tau_positive", tau_positive)
    _positive("sapo", "tau_negative", tau_negative)
    bound = _or(p_max, math.inf)
    return TokenLoss("sapo", SAPO, tau_positive, tau_negative, old=True, p_max=bound, needs_old_logp=True)


def nll(*, p_max: float | None = None) -> TokenLoss:
    """Negative log-likelihood; ignores advantages (weigh it with `token_weight`). p_max: as in `TokenLoss`."""
    return TokenLoss("nll", NLL, p_max=_or(p_max, math.inf))


def custom(fn: CustomLoss, *, needs_old_logp: bool = False) -> TokenLoss:
    """A loss of your own: fn(logp, old_logp, advantages) -> loss, [n] tensors each, differentiable in logp (nats).

    It sees all tokens of a chunk that use it, in no promised order: a token's loss must depend on that token alone.
    Without an `old_logp` it gets logp, detached. needs_old_logp: whether a call without one is an error.

    Raises:
        ValueError: fn is not callable; and, when it is called, what it returns is no tensor like logp.
    """
    if not callable(fn):
        raise ValueError(f"custom: fn must be callable, got {type(fn).__name__}")
    return TokenLoss(getattr(fn, "__name__", "custom"), CUSTOM, needs_old_logp=needs_old_logp, fn=fn)


def truncated_weight(old_logp: Tensor, sampler_logp: Tensor, cap: float = 2.0) -> Tensor:
    """min(pi_old / mu, cap) as a `token_weight`: truncated importance sampling, mu being the sampler (Yao et al. 2025,
    "Your efficient RL framework secretly brings you off-policy RL training").

    old_logp, sampler_logp: [...] float, nats, of one shape. cap: positive.

    Returns:
        [...] in their dtype, detached; 0 where either is not a number.

    Raises:
        ValueError: a cap that is not positive.
    """
    _positive("truncated_weight", "cap", cap)
    return _sampler_ratio(old_logp, sampler_logp).clamp(max=cap)


def masked_weight(old_logp: Tensor, sampler_logp: Tensor, low: float = 0.5, high: float = 5.0) -> Tensor:
    """pi_old / mu inside low..high and 0 outside, as a `token_weight` (IcePop: arXiv 2510.18855).

    old_logp, sampler_logp: [...] float, nats, of one shape.

    Returns:
        [...] in their dtype, detached; 0 where either is not a number.

    Raises:
        ValueError: low is negative, or not below high.
    """
    if not 0 <= low < high:
        raise ValueError(f"masked_weight: 0 <= low < high must hold, got {low} and {high}")
    ratio = _sampler_ratio(old_logp, sampler_logp)
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def _sampler_ratio(old_logp: Tensor, sampler_logp: Tensor) -> Tensor:
    """exp(old_logp - sampler_logp), 0 where either is not a number: such a token says nothing."""
    return bounded_ratio(old_logp.detach(), sampler_logp.detach()).nan_to_num(0.0)


def encode(losses: TokenLoss | tuple[TokenLoss, ...]) -> Tensor:
    """[n, len(COLUMNS)] float32 table on CPU; row i serves the tokens with loss_id i."""
    rows = (losses,) if isinstance(losses, TokenLoss) else losses
    return torch.tensor([spec.row() for spec in rows], dtype=torch.float32)


def looks_at_values(device: torch.device) -> bool:
    """Whether bad values raise: on CPU, and under LUFFY_KERNELS_DEBUG=1 where the look synchronises."""
    return device.type == "cpu" or os.environ.get("LUFFY_KERNELS_DEBUG") == "1"


def table_index(op: str, loss_id: Tensor | None, count: int, valid: Tensor) -> Tensor:
    """[N] row of the table of each token, 0 where not valid. A bad one raises on CPU; elsewhere, where a look would
    be a synchronisation, it gives `count`: callers add a row of NaN there."""
    if loss_id is None:
        return torch.zeros_like(valid, dtype=torch.int64)
    loss_id = torch.where(valid, loss_id.long(), 0)
    bad = (loss_id < 0) | (loss_id >= count)
    if looks_at_values(loss_id.device) and bool(bad.any()):
        raise ValueError(f"{op}: loss_id must be in [0, {count}), the rows of losses, got {int(loss_id[bad][0])}")
    return torch.where(bad, count, loss_id)


def bounded_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """exp(logp - old_logp), its logarithm within MAX_LOG_RATIO of 0."""
    return (logp - old_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def reads_old_logp(kind: Tensor, old: Tensor) -> Tensor:
    """Where the loss is a function of old_logp (elsewhere old_logp may hold anything)."""
    return (old != 0) | (kind == BEHAVIOUR_RATIO) | (kind == SHAPED_RELATIVE)


class Evaluated(NamedTuple):
    loss: Tensor  # [N] unweighted loss
    grad: Tensor  # [N] d loss / d logp
    ratio: Tensor  # [N] r, 1 where the loss does not read old_logp
    clipped: Tensor  # [N] bool, true where a clip or bound made the gradient zero


def evaluate(logp: Tensor, advantages: Tensor, old_logp: Tensor | None, rows: Tensor) -> Evaluated:
    """Value and gradient of every token's loss; zero for `custom` ones.

    Args:
        logp, advantages: [N] float. old_logp: [N] or None for "the same as logp" (r = 1).
        rows: [N, len(COLUMNS)], the table's row of each token, in logp's dtype.
    """
    kind, constant, second, old, clip_low, clip_high, dual_clip, x_min, x_max, p_max = rows.unbind(-1)
    old_logp = logp if old_logp is None else torch.where(reads_old_logp(kind, old), old_logp, logp)
    log_ratio = (logp - old_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    p, r = logp.exp(), log_ratio.exp()

    x = torch.where(old != 0, r, p)
    bounded = (x < x_min) | (x > x_max)
    inside = x.clamp(x_min, x_max)
    log_inside = torch.where(bounded, inside.log(), torch.where(old != 0, log_ratio, logp))
    u, slope = _surrogates(kind, constant, second, inside, log_inside, p, old_logp.exp(), r)

    up, down = advantages > 0, advantages < 0
    # Distance 1 + inf is inf; 1 - inf is -inf: the infinite defaults switch the clips off without a branch.
    clipped_u = torch.where(up, u.clamp(max=1 + clip_high), torch.minimum(u.clamp(min=1 - clip_low), dual_clip))
    off_side = (up & (u > 1 + clip_high)) | (down & ((u < 1 - clip_low) | (u > dual_clip)))
    clipped = off_side | bounded
    loss = -advantages * clipped_u
    grad = torch.where(clipped, 0.0, -advantages * slope)

    truncated = torch.minimum(r, constant)
    gate = torch.sigmoid((tau := torch.where(up, constant, second)) * (r - 1))
    for this, value, derivative in (
        (CISPO, -advantages * truncated * logp, -advantages * truncated),
        (SAPO, -advantages * 4 * gate / tau, -advantages * 4 * gate * (1 - gate) * r),
        (NLL, -logp, torch.full_like(logp, -1.0)),
        (CUSTOM, torch.zeros_like(logp), torch.zeros_like(logp)),
    ):
        loss, grad = torch.where(kind == this, value, loss), torch.where(kind == this, derivative, grad)
        clipped = clipped & (kind != this)

    unused = (advantages == 0) & (kind != NLL)  # an exact zero, even where a factor is not finite
    dropped = p > p_max
    zero = unused | dropped
    clipped = (clipped & ~unused) | dropped
    return Evaluated(torch.where(zero, 0.0, loss), torch.where(zero, 0.0, grad), r, clipped)


def kl(logp: Tensor, ref_logp: Tensor, kl_type: str) -> tuple[Tensor, Tensor]:
    """Estimate of KL(policy || reference) per token and its derivative in logp.

    With d = logp - ref_logp: k1 = d, k2 = d^2/2, k3 = exp(-d) + d - 1 (d bounded as a ratio's logarithm is). The names
    are those of Schulman, "Approximating KL divergence", 2020.
    """
    d = logp - ref_logp
    if kl_type == "k1":
        return d, torch.ones_like(d)
    if kl_type == "k2":
        return d.square() / 2, d
    less = torch.expm1(-d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    return less + d, -less


def evaluate_custom(
    spec: TokenLoss, mine: Tensor, logp: Tensor, advantages: Tensor, old_logp: Tensor | None, other: Evaluated
) -> Evaluated:
    """`other` with the tokens where `mine` replaced by a custom loss, its gradient by autograd."""
    at = mine.nonzero().view(-1)
    assert spec.fn is not None, f"{spec.name} has a function"
    with torch.enable_grad():
        leaf = logp[at].detach().requires_grad_()
        old = old_logp[at] if spec.needs_old_logp and old_logp is not None else leaf.detach()
        loss = spec.fn(leaf, old, advantages[at])
        if not isinstance(loss, Tensor) or loss.shape != leaf.shape:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"custom: {spec.name} must return a tensor like logp, {tuple(leaf.shape)}, got {got}")
        (grad,) = torch.autograd.grad(loss.sum(), leaf, allow_unused=True) if loss.requires_grad else (None,)
    grad = torch.zeros_like(leaf) if grad is None else grad
    ratio = bounded_ratio(leaf.detach(), old)
    flat = torch.zeros_like(at, dtype=torch.bool)
    values = (loss.detach().to(logp.dtype), grad, ratio, flat)
    return Evaluated(*(x.index_copy(0, at, value) for x, value in zip(other, values, strict=True)))


def _surrogates(
    kind: Tensor, constant: Tensor, second: Tensor, x: Tensor, log_x: Tensor, p: Tensor, q: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """u and du/dlogp of the kinds that are surrogates; anything elsewhere."""
    is_power, is_sum = kind == POWER, kind == PROB_PLUS_LOG
    # x / (x + c) and its derivative as products of numbers <= 1, so that neither overflows.
    share = x / (x + constant)
    raised = (torch.where(is_power, constant, 0.0) * log_x).exp()
    relative = r * (q + constant) / (p + constant)  # f(p) / f(q), finite however small q is
    log_term = torch.where(is_sum, second, 0.0)
    # 0 * log 0 must be 0: a spec without a logarithm has second = 0
    plus = constant * x + torch.where(log_term == 0, 0.0, log_term * log_x)
    behaviour = x / (q + constant)
    u, slope = behaviour, behaviour
    for this, value, derivative in (
        (POWER, raised, constant * raised),
        (SHAPED, share, share * (1 - share)),
        (SHAPED_RELATIVE, relative, relative * constant / (p + constant)),
        (PROB_PLUS_LOG, plus, constant * x + log_term),
    ):
        u, slope = torch.where(kind == this, value, u), torch.where(kind == this, derivative, slope)
    return u, slope


def _surrogate(
    name: str,
    kind: int,
    constant: float,
    *,
    second: float = 0.0,
    ratio: str = "prob",
    clips: tuple[float | None, float | None, float | None] = (None, None, None),
    x: tuple[float | None, float | None] = (None, None),
    p_max: float | None = None,
    needs_old_logp: bool = False,
) -> TokenLoss:
    if ratio not in ("prob", "old"):
        raise ValueError(f"{name}: ratio must be 'prob' or 'old', got {ratio!r}")
    for bound, value, least in zip(("clip_low", "clip_high", "dual_clip"), clips, (0.0, 0.0, 1.0), strict=True):
        if value is not None and not value > least:
            raise ValueError(f"{name}: {bound} must be greater than {least}, got {value}")
    return TokenLoss(
        name,
        kind,
        constant,
        second,
        ratio == "old",
        _or(clips[0], math.inf),
        _or(clips[1], math.inf),
        _or(clips[2], math.inf),
        _or(x[0], -math.inf),
        _or(x[1], math.inf),
        _or(p_max, math.inf),
        needs_old_logp=needs_old_logp or ratio == "old",
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _positive(name: str, argument: str, value: float) -> None:
    if not value > 0.0:
        raise ValueError(f"{name}: {argument} must be positive, got {value}")
