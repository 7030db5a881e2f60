"""The table of token losses on the device: `luffy_kernels.token_losses.evaluate` and `kl` for one token."""

import triton
import triton.language as tl

from .. import token_losses as table
from .device import expm1

POWER = tl.constexpr(table.POWER)
SHAPED = tl.constexpr(table.SHAPED)
SHAPED_RELATIVE = tl.constexpr(table.SHAPED_RELATIVE)
PROB_PLUS_LOG = tl.constexpr(table.PROB_PLUS_LOG)
BEHAVIOUR_RATIO = tl.constexpr(table.BEHAVIOUR_RATIO)
CISPO = tl.constexpr(table.CISPO)
SAPO = tl.constexpr(table.SAPO)
NLL = tl.constexpr(table.NLL)
COLUMNS = tl.constexpr(len(table.COLUMNS))
MAX_LOG_RATIO = tl.constexpr(table.MAX_LOG_RATIO)


@triton.jit
def bound(x):
    """A ratio's logarithm, held within MAX_LOG_RATIO of 0."""
    return tl.minimum(tl.maximum(x, -MAX_LOG_RATIO), MAX_LOG_RATIO)


@triton.jit
def surrogate(kind, constant, second, x, log_x, p, q, r):
    """(u, du/dlogp) of the kinds that are surrogates; anything elsewhere."""
    share = x / (x + constant)
    raised = tl.exp(tl.where(kind == POWER, constant, 0.0) * log_x)
    relative = r * (q + constant) / (p + constant)
    weight = tl.where(kind == PROB_PLUS_LOG, second, 0.0)
    plus = constant * x + tl.where(weight == 0, 0.0, weight * log_x)
    u = x / (q + constant)
    slope = u
    u = tl.where(kind == POWER, raised, u)
    slope = tl.where(kind == POWER, constant * raised, slope)
    u = tl.where(kind == SHAPED, share, u)
    slope = tl.where(kind == SHAPED, share * (1.0 - share), slope)
    u = tl.where(kind == SHAPED_RELATIVE, relative, u)
    slope = tl.where(kind == SHAPED_RELATIVE, relative * constant / (p + constant), slope)
    u = tl.where(kind == PROB_PLUS_LOG, plus, u)
    slope = tl.where(kind == PROB_PLUS_LOG, constant * x + weight, slope)
    return u, slope


@triton.jit
def evaluate(row, logp, advantage, given_old, OLD: tl.constexpr):
    """(loss, d loss / d logp, ratio, clipped) of one token; row: its line of the table. Without OLD r is 1."""
    kind = tl.load(row)
    constant = tl.load(row + 1)
    second = tl.load(row + 2)
    of_ratio = tl.load(row + 3) != 0
    clip_low = tl.load(row + 4)
    clip_high = tl.load(row + 5)
    dual_clip = tl.load(row + 6)
    x_min = tl.load(row + 7)
    x_max = tl.load(row + 8)
    p_max = tl.load(row + 9)

    old = logp
    if OLD:
        reads = of_ratio | (kind == BEHAVIOUR_RATIO) | (kind == SHAPED_RELATIVE)
        old = tl.where(reads, given_old, logp)
    log_ratio = bound(logp - old)
    p = tl.exp(logp)
    r = tl.exp(log_ratio)
    x = tl.where(of_ratio, r, p)
    bounded = (x < x_min) | (x > x_max)
    inside = tl.minimum(tl.maximum(x, x_min), x_max)
    log_inside = tl.where(bounded, tl.log(inside), tl.where(of_ratio, log_ratio, logp))
    u, slope = surrogate(kind, constant, second, inside, log_inside, p, tl.exp(old), r)

    up = advantage > 0
    down = advantage < 0
    clipped_u = tl.where(up, tl.minimum(u, 1.0 + clip_high), tl.minimum(tl.maximum(u, 1.0 - clip_low), dual_clip))
    clipped = (up & (u > 1.0 + clip_high)) | (down & ((u < 1.0 - clip_low) | (u > dual_clip))) | bounded
    loss = -advantage * clipped_u
    grad = tl.where(clipped, 0.0, -advantage * slope)

    truncated = tl.minimum(r, constant)
    tau = tl.where(up, constant, tl.where(kind == SAPO, second, 1.0))
    gate = tl.sigmoid(tau * (r - 1.0))
    loss = tl.where(kind == CISPO, -advantage * truncated * logp, loss)
    grad = tl.where(kind == CISPO, -advantage * truncated, grad)
    loss = tl.where(kind == SAPO, -advantage * 4.0 * gate / tau, loss)
    grad = tl.where(kind == SAPO, -advantage * 4.0 * gate * (1.0 - gate) * r, grad)
    loss = tl.where(kind == NLL, -logp, loss)
    grad = tl.where(kind == NLL, -1.0, grad)
    clipped = clipped & (kind != CISPO) & (kind != SAPO) & (kind != NLL)

    unused = (advantage == 0) & (kind != NLL)  # an exact zero, even where a factor is not finite
    dropped = p > p_max
    loss = tl.where(unused | dropped, 0.0, loss)
    grad = tl.where(unused | dropped, 0.0, grad)
    # min and max above may drop a NaN; a token without a log-prob must not look trained.
    broken = logp != logp
    loss = tl.where(broken, logp, loss)
    grad = tl.where(broken, logp, grad)
    return loss, grad, r, (clipped & (unused == 0)) | dropped


@triton.jit
def kl_term(logp, ref_logp, kind):
    """(KL estimate, its derivative in logp); kind 1, 2, 3 for k1, k2, k3."""
    d = logp - ref_logp
    less = expm1(-bound(d))
    value = tl.where(kind == 1, d, tl.where(kind == 2, d * d / 2, less + d))
    slope = tl.where(kind == 1, 1.0, tl.where(kind == 2, d, -less))
    return value, slope
