"""What a caller can get wrong, said in one form: ValueError("<op>: <argument> must be ..., got ...").

Shapes, dtypes and devices are checked where the public function runs, so under torch.compile too. Values are checked on
CPU only, inside the operator where tensors are real: on a device the same check would be a hidden synchronisation, and
runs under LUFFY_KERNELS_DEBUG=1.
"""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from .token_losses import TokenLoss, looks_at_values

KL_TYPES = ("k1", "k2", "k3")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def require(holds: bool, op: str, argument: str, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{op}: {argument} must be {rule}, got {got}")


def check_head(op: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """hidden [..., H], weight [V, H], targets [...], bias [V]; one device; floating operands."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        require(isinstance(tensor, Tensor), op, name, "a tensor", type(tensor).__name__)
    # A DTensor looks like a tensor of the full shape but holds a shard; multiplying it here would use the shard alone.
    sharded = hasattr(weight, "placements")
    require(
        not sharded,
        op,
        "weight",
        "unsharded (call the op inside the FSDP root's forward, or full_tensor())",
        "a DTensor",
    )
    require(weight.ndim == 2, op, "weight", "[V, H]", tuple(weight.shape))
    vocabulary, width = weight.shape
    shape = f"[..., {width}] to match weight"
    require(hidden.ndim >= 1 and hidden.shape[-1] == width, op, "hidden", shape, tuple(hidden.shape))
    leading = tuple(hidden.shape[:-1])
    require(tuple(targets.shape) == leading, op, "targets", f"{leading} to match hidden", tuple(targets.shape))
    require(targets.dtype == torch.int64, op, "targets", "int64", targets.dtype)
    for name, operand in (("hidden", hidden), ("weight", weight)):
        require(operand.dtype in FLOATS, op, name, "bfloat16, float16, float32 or float64", operand.dtype)
    tensors = [("weight", weight), ("targets", targets)]
    if bias is not None:
        require(isinstance(bias, Tensor), op, "bias", "a tensor", type(bias).__name__)
        require(tuple(bias.shape) == (vocabulary,), op, "bias", f"[{vocabulary}]", tuple(bias.shape))
        require(bias.dtype in FLOATS, op, "bias", "floating point", bias.dtype)
        tensors.append(("bias", bias))
    for name, tensor in tensors:
        require(tensor.device == hidden.device, op, name, f"on {hidden.device} like hidden", tensor.device)


def check_transform(op: str, softcap: float | None, logit_scale: float) -> None:
    require(softcap is None or softcap > 0, op, "softcap", "positive", softcap)
    require(logit_scale > 0, op, "logit_scale", "positive", logit_scale)


def check_losses(
    op: str,
    losses: TokenLoss | tuple[TokenLoss, ...],
    loss_id: Tensor | None,
    old_logp: Tensor | str | None,
    like: Tensor,
) -> tuple[TokenLoss, ...]:
    """The specs as a tuple. `like` has the shape that per-token arguments must have."""
    specs = (losses,) if isinstance(losses, TokenLoss) else tuple(losses)
    typed = bool(specs) and all(isinstance(spec, TokenLoss) for spec in specs)
    require(typed, op, "losses", "one token loss or a non-empty tuple of them", specs)
    require(len(specs) == 1 or loss_id is not None, op, "loss_id", "given with more than one loss", None)
    if loss_id is not None:
        require(isinstance(loss_id, Tensor), op, "loss_id", "a tensor", type(loss_id).__name__)
        require(loss_id.shape == like.shape, op, "loss_id", f"of shape {tuple(like.shape)}", tuple(loss_id.shape))
        require(loss_id.device == like.device, op, "loss_id", f"on {like.device}", loss_id.device)
        require(not loss_id.is_floating_point(), op, "loss_id", "an integer tensor", loss_id.dtype)
    needing = [spec.name for spec in specs if spec.needs_old_logp]
    require(not needing or old_logp is not None, op, "old_logp", f"given ({', '.join(needing)} reads it)", None)
    if isinstance(old_logp, str):
        require(old_logp == "current", op, "old_logp", "a tensor or 'current'", repr(old_logp))
    return specs


def check_kl(op: str, kl_type: str, kl_coef: float | Tensor, ref_logp: Tensor | None) -> None:
    require(kl_type in KL_TYPES, op, "kl_type", f"one of {KL_TYPES}", repr(kl_type))
    unused = isinstance(kl_coef, (int, float)) and kl_coef == 0.0
    require(unused or ref_logp is not None, op, "ref_logp", "given where kl_coef is not 0", None)


def per_token(op: str, name: str, value: float | Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """A number or a tensor that broadcasts dimension by dimension to targets' shape -> [N] or 0-d, detached."""
    if not isinstance(value, Tensor):
        require(isinstance(value, numbers.Real), op, name, "a number or a tensor", type(value).__name__)
        return torch.full((), value, dtype=dtype, device=targets.device)
    require(
        value.device == targets.device or value.ndim == 0, op, name, f"on {targets.device} like targets", value.device
    )
    value = value.detach().to(device=targets.device, dtype=dtype)
    if value.ndim == 0:
        return value
    fits = value.ndim == targets.ndim and all(a in (1, b) for a, b in zip(value.shape, targets.shape, strict=True))
    require(fits, op, name, f"broadcastable to {tuple(targets.shape)}, with as many dimensions", tuple(value.shape))
    return value.expand(targets.shape).reshape(-1)


def checked_normalizer(op: str, normalizer: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The normaliser as a 0-d tensor."""
    if not isinstance(normalizer, Tensor):
        number = isinstance(normalizer, numbers.Real)
        require(number, op, "normalizer", "a number or a 0-d tensor", type(normalizer).__name__)
        require(0 < normalizer < math.inf, op, "normalizer", "positive and finite", normalizer)
        return torch.full((), normalizer, dtype=dtype, device=device)
    require(normalizer.ndim == 0, op, "normalizer", "a number or a 0-d tensor", tuple(normalizer.shape))
    if normalizer.device.type == "cpu" and not torch.compiler.is_compiling():
        usable = bool((normalizer > 0) & normalizer.isfinite())
        require(usable, op, "normalizer", "positive and finite", float(normalizer))
    return positive(normalizer.detach().to(device=device, dtype=dtype))


def positive(x: Tensor) -> Tensor:
    """x, NaN where it is not positive: what reaches a device unchecked must not pass for a result."""
    return torch.where(x > 0, x, torch.nan)


def check_head_values(op: str, targets: Tensor, vocabulary: int, ignore_index: int, temperature: Tensor) -> None:
    """Target range and temperature; on a device under LUFFY_KERNELS_DEBUG=1 alone, as the look synchronises."""
    if not looks_at_values(targets.device):
        return
    bad = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))]
    if bad.numel():
        require(False, op, "targets", f"in [0, {vocabulary}) or {ignore_index}", int(bad[0]))
    usable = (temperature > 0) & temperature.isfinite()
    if not bool(usable.all()):
        require(False, op, "temperature", "positive and finite", float(temperature.reshape(-1)[~usable.reshape(-1)][0]))
