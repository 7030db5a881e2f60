"""Policy loss of a linear head in 3 GEMMs: no [N, V] logits, no second forward, rows that cannot matter skipped exactly.

    z    = softcap(logit_scale * (hidden W^T + bias)) / temperature        [N, V], a chunk at a time, fp32
    logp = z[target] - logsumexp z     ent = -sum_v p_v log p_v             p = softmax z
    loss = sum_t (token_weight_t loss_t + kl_coef_t kl_t - entropy_coef_t ent_t) / normalizer

Advantages and old log-probs are known before the forward pass, so d loss / d logp is known as soon as a chunk's logits
are: the sweep that computes the loss computes both gradients, and backward only scales them. N tokens, H hidden, V
vocabulary. Ignored rows enter no GEMM; rows whose coefficients are exactly zero (advantage 0, clipped) only the first.

Memory: `chunk_bytes` for the [C, V] buffers (`_chunks.chunk_rows`), dW in fp32, dh in the operands' dtype; on CPU a
16-bit weight is packed or widened once (2 or 4 V H bytes). Deterministic. Do not place the head inside a checkpointed
region: it would run twice.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _chunks, _library, token_losses
from ._checks import check_head, check_head_values, per_token, require

OP = "linear_policy_loss"
KL_TYPES = ("k1", "k2", "k3")


class PolicyLoss(NamedTuple):
    """`loss` carries the gradient; the rest is detached, per token, in targets' shape, 0 in ignored rows."""

    loss: Tensor  # [] float32 (float64 for float64 operands)
    logp: Tensor  # log-probability of the target, nats
    entropy: Tensor  # nats
    ratio: Tensor  # exp(logp - old_logp); 1 where the token's loss does not read old_logp
    kl: Tensor  # kl_t, before kl_coef; 0 without ref_logp
    clipped: Tensor  # bool: a clip or bound made the token's gradient zero


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
    chunk_bytes: int | None = None,
    backend: Literal["auto", "torch"] = "auto",
) -> PolicyLoss:
    """Sum of token losses over valid rows, divided by `normalizer`; differentiable in hidden, weight and bias.

    Args:
        hidden: [..., H] float. weight: [V, H] float, same device; GEMMs run in the promoted dtype of the two.
        targets: [...] int64, already aligned with hidden (nothing is shifted); `ignore_index` marks rows to skip.
        advantages: number or tensor broadcastable to targets with as many dimensions ([B, 1] for per-sequence ones).
        losses: one `token_losses` spec, or a tuple of them that `loss_id` (int64, targets' shape) indexes.
        old_logp: tensor like targets, or "current" for this pass's own log-probs (ratio 1). Read only where a token's
            loss is a function of it; elsewhere it may hold anything. ref_logp: tensor like targets, for the KL term.
        token_weight: multiplies the policy term only.
        normalizer: positive number or 0-d tensor; nothing else is divided by (no token mean, no row mean).
        entropy_coef, kl_coef: number, 0-d or per-token tensor. kl_type, with d = logp - ref_logp: k1 = d, k2 = d^2/2,
            k3 = exp(-d) + d - 1.
        temperature: positive number or tensor like advantages. softcap: cap * tanh(x / cap), before the temperature.
        chunk_bytes: bound of the [C, V] buffers; default 256 MiB on CPU, 1 GiB on a device.

    Returns:
        PolicyLoss. Gradients have the inputs' dtypes; none is computed under no_grad or for inputs that need none.

    Raises:
        ValueError: what `_checks` lists, a loss that needs an absent old_logp, an unknown or unavailable backend.
    """
    check_head(OP, hidden, weight, targets, bias)
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    dtype = _chunks.compute_dtype(operand)
    specs = (losses,) if isinstance(losses, token_losses.TokenLoss) else tuple(losses)
    _check_losses(specs, loss_id, old_logp, targets)
    require(kl_type in KL_TYPES, OP, "kl_type", f"one of {KL_TYPES}", repr(kl_type))
    no_kl = isinstance(kl_coef, (int, float)) and kl_coef == 0.0
    require(no_kl or ref_logp is not None, OP, "ref_logp", "given where kl_coef is not 0", None)
    require(softcap is None or softcap > 0, OP, "softcap", "positive", softcap)
    chunk_bytes = _library.chunk_budget(OP, chunk_bytes, hidden.device)

    def token(name: str, value: float | Tensor | None) -> Tensor | None:
        return None if value is None else per_token(OP, name, value, targets, dtype)

    def coefficient(name: str, value: float | Tensor) -> Tensor | None:
        return None if isinstance(value, (int, float)) and value == 0.0 else per_token(OP, name, value, targets, dtype)

    grad = torch.is_grad_enabled()
    op = _library.resolve(OP, backend, hidden.device, operand)
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
        chunk_bytes,
        [
            grad and hidden.requires_grad,
            grad and weight.requires_grad,
            grad and bias is not None and bias.requires_grad,
        ],
    )
    shape = targets.shape
    per_row = (x.detach().view(shape) for x in (logp, entropy, ratio, kl, clipped))
    return PolicyLoss(total / _checked_normalizer(normalizer, hidden.device, dtype), *per_row)


def _check_losses(
    specs: tuple[token_losses.TokenLoss, ...], loss_id: Tensor | None, old_logp: Tensor | str | None, targets: Tensor
) -> None:
    typed = bool(specs) and all(isinstance(spec, token_losses.TokenLoss) for spec in specs)
    require(typed, OP, "losses", "one token loss or a non-empty tuple of them", specs)
    require(len(specs) == 1 or loss_id is not None, OP, "loss_id", "given with more than one loss", None)
    if loss_id is not None:
        require(
            loss_id.shape == targets.shape, OP, "loss_id", f"{tuple(targets.shape)} like targets", tuple(loss_id.shape)
        )
        require(not loss_id.is_floating_point(), OP, "loss_id", "an integer tensor", loss_id.dtype)
    needing = [spec.name for spec in specs if spec.needs_old_logp]
    require(not needing or old_logp is not None, OP, "old_logp", f"given ({', '.join(needing)} reads it)", None)
    if isinstance(old_logp, str):
        require(old_logp == "current", OP, "old_logp", "a tensor or 'current'", repr(old_logp))


def _checked_normalizer(normalizer: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if not isinstance(normalizer, Tensor):
        require(normalizer > 0, OP, "normalizer", "positive", normalizer)
        return torch.full((), normalizer, dtype=dtype, device=device)
    require(normalizer.ndim == 0, OP, "normalizer", "a number or a 0-d tensor", tuple(normalizer.shape))
    if normalizer.device.type == "cpu" and not torch.compiler.is_compiling():
        require(bool(normalizer > 0), OP, "normalizer", "positive", float(normalizer))
    return normalizer.detach().to(device=device, dtype=dtype)


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

    def evaluate(self, at: Tensor, stats: _chunks.Stats) -> tuple[Tensor, Tensor, Tensor, token_losses.Evaluated]:
        """Weighted loss incl. KL and entropy, its derivative in logp, the KL, and the bare token loss."""
        logp = stats.logp
        cut = [None if x is None else x[at] for x in (self.old_logp, self.ref_logp, self.weight)]
        old_logp, ref_logp, weight = cut
        token = token_losses.evaluate(logp, self.advantages[at], old_logp, self.rows[at])
        loss = token.loss if weight is None else token.loss * weight
        g = token.grad if weight is None else token.grad * weight
        kl = torch.zeros_like(logp)
        if ref_logp is not None:
            kl, kl_grad = _kl(logp - ref_logp, self.kl_type)
            if self.kl_coef is not None:
                loss, g = loss + self.kl_coef[at] * kl, g + self.kl_coef[at] * kl_grad
        if self.entropy_coef is not None:
            loss = loss - self.entropy_coef[at] * stats.entropy
        return loss, g, kl, token

    def may_matter(self) -> Tensor:
        """[N] bool: rows whose gradient is not known to be zero before the forward pass."""
        live = (self.advantages != 0) | (self.rows[:, 0] == token_losses.NLL)
        live = live if self.weight is None else live & (self.weight != 0)
        for coefficient in (self.entropy_coef, self.kl_coef):
            live = live if coefficient is None else live | (coefficient != 0)
        return live


def _kl(d: Tensor, kl_type: str) -> tuple[Tensor, Tensor]:
    """Estimate of KL(policy || reference) per token and its derivative in logp, d = logp - ref_logp."""
    if kl_type == "k1":
        return d, torch.ones_like(d)
    if kl_type == "k2":
        return d.square() / 2, d
    return torch.expm1(-d) + d, -torch.expm1(-d)


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
    n, dtype = targets.shape[0], advantages.dtype
    check_head_values(OP, targets, weight.shape[0], ignore_index, temperature)
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    head = _chunks.make_head(weight, bias, temperature, softcap, logit_scale, operand, n)

    def spread(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(n)

    tokens = _Tokens(
        losses.to(dtype)[_table_index(loss_id, losses.shape[0], targets, ignore_index)],
        advantages.expand(n),
        spread(old_logp),
        spread(ref_logp),
        spread(token_weight),
        spread(entropy_coef),
        spread(kl_coef),
        kl_type,
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


def _table_index(loss_id: Tensor | None, count: int, targets: Tensor, ignore_index: int) -> Tensor:
    if loss_id is None:
        return torch.zeros_like(targets)
    loss_id = torch.where(targets == ignore_index, 0, loss_id)
    if loss_id.device.type == "cpu":
        bad = loss_id[(loss_id < 0) | (loss_id >= count)]
        if bad.numel():
            require(False, OP, "loss_id", f"in [0, {count}), the rows of losses", int(bad[0]))
    return loss_id.long()


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
_library.register(OP, "torch", policy_loss_torch)
