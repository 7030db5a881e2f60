"""Which implementation serves an operator: `resolve` picks it, `status` tells.

Every implementation is its own torch.library operator (policy_loss_torch, logprobs_torch, logprobs_cpp): schema, fake
and autograd are registered beside its Python code, so torch.compile and opcheck see ordinary operators. The compiled
CPU library only adds kernels to schemas defined here; without it those schemas have none and `auto` uses torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _native
from ._checks import require
from ._chunks import DEFAULT_CHUNK_BYTES

BACKENDS = ("auto", "torch", "cpp")
_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {}


def register(op: str, backend: str, implementation: Callable[..., Any]) -> None:
    _IMPLEMENTATIONS.setdefault(op, {})[backend] = implementation


def why_not(op: str, backend: str, device: torch.device, operand: torch.dtype) -> str | None:
    """Why this backend cannot serve the op for operands of this kind, or None when it can."""
    if backend not in _IMPLEMENTATIONS[op]:
        return f"{op} has no {backend} implementation"
    if backend == "cpp":
        if device.type != "cpu":
            return f"it runs on cpu, not {device.type}"
        if operand == torch.float64:
            return "it computes in float32, and float64 operands ask for more"
        return _native.error
    return None


def resolve(op: str, backend: str, device: torch.device, operand: torch.dtype) -> Callable[..., Any]:
    require(backend in BACKENDS, op, "backend", f"one of {BACKENDS}", repr(backend))
    if backend != "auto":
        reason = why_not(op, backend, device, operand)
        require(reason is None, op, "backend", f"available ({reason})", repr(backend))
        return _IMPLEMENTATIONS[op][backend]
    chosen = "torch" if why_not(op, "cpp", device, operand) else "cpp"
    return _IMPLEMENTATIONS[op][chosen]


def status() -> str:
    """One line per operator: the backend `auto` takes here for bfloat16 operands, and why not the others."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = []
    for op in sorted(_IMPLEMENTATIONS):
        reason = why_not(op, "cpp", device, torch.bfloat16)
        chosen = "cpp" if reason is None else f"torch (not cpp: {reason})"
        lines.append(f"{op} on {device.type}: {chosen}")
    wide = (
        "compiled bfloat16 kernels" if device.type == "cpu" and _native.has_wide_mm(torch.bfloat16, 2) else "torch.mm"
    )
    lines.append(f"GEMMs of the torch backend on {device.type}: {wide}")
    return "\n".join(lines)


def chunk_budget(op: str, chunk_bytes: int | None, device: torch.device) -> int:
    if chunk_bytes is None:
        return DEFAULT_CHUNK_BYTES.get(device.type, DEFAULT_CHUNK_BYTES["cuda"])
    require(chunk_bytes > 0, op, "chunk_bytes", "positive", chunk_bytes)
    return chunk_bytes
