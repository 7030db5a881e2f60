"""Which implementation serves an operator: `resolve` picks it, `status` tells.

Every implementation is its own torch.library operator (policy_loss_torch, policy_loss_triton, logprobs_cpp): schema,
fake and autograd are registered beside its Python code, so torch.compile and opcheck see ordinary operators. The
compiled CPU library only adds kernels to schemas of `_native`; without it those have none and `auto` uses torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from . import _cpp_rows, _gemm, _native, _torch_rows
from ._checks import require
from ._chunks import DEFAULT_CHUNK_BYTES, RowKernels

BACKENDS = ("auto", "torch", "cpp", "triton")
_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {}


@contextlib.contextmanager
def isolated(operand: Tensor) -> Iterator[None]:
    """What an operator computes depends on its operands alone.

    Triton launches on the current device, wherever its operands are, and under autocast the products of an operator's
    own arithmetic would lose the precision that it promises.
    """
    with torch.cuda.device_of(operand), torch.autocast(operand.device.type, enabled=False):
        yield


def define(
    name: str, implementation: Callable[..., Any], options: Callable[[], dict[str, Any]] | None = None
) -> CustomOpDef:
    """torch.library operator `name` of the implementation's positional parameters, from their annotations.

    Keyword-only parameters are what no schema can carry: `options` gives them at every call.
    """

    def run(*args: Any) -> Any:
        with isolated(args[0]):
            return implementation(*args, **(options() if options else {}))

    signature = inspect.signature(implementation, eval_str=True)
    positional = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    run.__signature__ = signature.replace(parameters=positional)  # type: ignore[attr-defined]
    return torch.library.custom_op(f"{_native.NAMESPACE}::{name}", run, mutates_args=())


def register(op: str, backend: str, implementation: Callable[..., Any]) -> None:
    _IMPLEMENTATIONS.setdefault(op, {})[backend] = implementation


def why_not(op: str, backend: str, device: torch.device, operand: torch.dtype, spread: bool = False) -> str | None:
    """Why this backend cannot serve the op for operands of this kind, or None when it can.

    spread: the vocabulary is spread over ranks.
    """
    if backend not in _IMPLEMENTATIONS[op]:
        return f"{op} has no {backend} implementation"
    if backend == "torch":
        return None
    if operand == torch.float64:
        return "it computes in float32, and float64 operands ask for more"
    if backend == "cpp":
        if device.type != "cpu":
            return f"it runs on cpu, not {device.type}"
        if spread:
            return "it does not spread a vocabulary over ranks"
        return _native.error
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it runs on cuda and rocm devices, not {device.type} (except under TRITON_INTERPRET=1, slowly)"
    return None


def resolve(op: str, backend: str, device: torch.device, operand: torch.dtype, spread: bool = False) -> str:
    """The backend that serves this call."""
    require(backend in BACKENDS, op, "backend", f"one of {BACKENDS}", repr(backend))
    if backend != "auto":
        reason = why_not(op, backend, device, operand, spread)
        require(reason is None, op, "backend", f"available ({reason})", repr(backend))
        return backend
    best = "cpp" if device.type == "cpu" else "triton"
    return "torch" if why_not(op, best, device, operand, spread) else best


def implementation(op: str, backend: str) -> Callable[..., Any]:
    return _IMPLEMENTATIONS[op][backend]


def row_kernels(backend: str) -> RowKernels:
    """The [C, V] arithmetic of the chunk driver. Triton is imported on first use."""
    if backend != "triton":
        return _cpp_rows if backend == "cpp" else _torch_rows
    from ._triton import rows

    return rows


def status() -> str:
    """A table: which backends serve which operator here for bfloat16 operands, which one `auto` takes, and why not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reasons: list[str] = []

    def cell(op: str, backend: str) -> str:
        if backend not in _IMPLEMENTATIONS[op]:
            return "-"
        reason = why_not(op, backend, device, torch.bfloat16)
        if reason is None:
            return "yes"
        if reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})"

    rows: list[tuple[str, ...]] = [(f"on {device.type}", "auto", *BACKENDS[1:])]
    for op in sorted(_IMPLEMENTATIONS):
        rows.append((op, resolve(op, "auto", device, torch.bfloat16), *(cell(op, b) for b in BACKENDS[1:])))
    lines = [f"{row[0]:<22}" + "".join(f"{x:<8}" for x in row[1:]).rstrip() for row in rows]
    wide = _gemm.widens(device.type, torch.bfloat16)
    lines.append(f"{'logits GEMM of torch':<22}torch.mm{', float32 out' if wide else ' of widened operands'}")
    if device.type == "cpu" and _native.error is None:
        ops = _native.OPS
        units = "bfloat16" if ops.bf16_words(torch.empty(0, 2, dtype=torch.bfloat16)) else "widened to float32"
        lines.append(f"{'products of cpp':<22}{units}; row arithmetic: {ops.tile_isa()}")
    return "\n".join([*lines, *(f"({n}) {reason}" for n, reason in enumerate(reasons, 1))])


def chunk_budget(op: str, chunk_bytes: int | None, device: torch.device) -> int:
    if chunk_bytes is None:
        return DEFAULT_CHUNK_BYTES.get(device.type, DEFAULT_CHUNK_BYTES["cuda"])
    require(chunk_bytes > 0, op, "chunk_bytes", "positive", chunk_bytes)
    return chunk_bytes
