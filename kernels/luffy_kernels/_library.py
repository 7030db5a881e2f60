"""Which implementation serves an operator: `resolve` picks it, `status` tells.

Every implementation is its own torch.library operator (policy_loss_torch, logprobs_torch, logprobs_cpp): schema, fake and
autograd are registered beside its Python code, so torch.compile and opcheck see ordinary operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._checks import require
from ._chunks import DEFAULT_CHUNK_BYTES

BACKENDS = ("auto", "torch", "cpp")
_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {}


def register(op: str, backend: str, implementation: Callable[..., Any]) -> None:
    _IMPLEMENTATIONS.setdefault(op, {})[backend] = implementation


def resolve(op: str, backend: str, device: torch.device) -> Callable[..., Any]:
    require(backend in BACKENDS, op, "backend", f"one of {BACKENDS}", repr(backend))
    return _IMPLEMENTATIONS[op]["torch"]


def chunk_budget(op: str, chunk_bytes: int | None, device: torch.device) -> int:
    if chunk_bytes is None:
        return DEFAULT_CHUNK_BYTES.get(device.type, DEFAULT_CHUNK_BYTES["cuda"])
    require(chunk_bytes > 0, op, "chunk_bytes", "positive", chunk_bytes)
    return chunk_bytes
