"""Matrix products that keep fp32: wider results than operands, and additions into an fp32 accumulator.

Products of 16-bit operands may stay in fp32 (`out_dtype`) in some builds and on some devices: it is tried once on small
matrices, strides included, and what fails or lies is not used.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Rows that are widened at a time where no product here widens on its own.
BLOCK = 4096


@contextlib.contextmanager
def ieee_float32(device: torch.device) -> Iterator[None]:
    """fp32 products inside are IEEE ones, whatever the program allows elsewhere (TF32 keeps 10 bits)."""
    backend = torch.backends.cuda.matmul
    # Not `allow_tf32`: reading it raises once a program has used the newer setting, and this one sees both.
    allowed = backend.fp32_precision
    if device.type != "cuda" or allowed in ("ieee", "none"):
        yield
        return
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = allowed


def widen(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b, where out may be strided by rows and wider than the operands (`widens` must hold then)."""
    with ieee_float32(a.device):
        if out.dtype == a.dtype:
            torch.mm(a, b, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)


def accumulate(out: Tensor, a: Tensor, b: Tensor, *, fresh: bool = False) -> None:
    """out += a b, or out = a b when `fresh`, the sum in out's dtype; one pass over out where the build fuses it."""
    if fresh and (out.dtype == a.dtype or widens(a.device.type, a.dtype)):
        widen(out, a, b)
        return
    if fresh:
        out.zero_()
    with ieee_float32(a.device):
        if out.dtype == a.dtype:
            out.addmm_(a, b)
        elif adds_wide(a.device.type, a.dtype):
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        elif widens(a.device.type, a.dtype):
            out.add_(torch.mm(a, b, out_dtype=out.dtype))
        else:
            wide = b.to(out.dtype)
            for mine, rows in zip(out.split(BLOCK), a.split(BLOCK), strict=True):
                mine.addmm_(rows.to(out.dtype), wide)


@functools.cache
def widens(device: str, operand: torch.dtype) -> bool:
    """Whether torch.mm gives fp32 from these 16-bit operands here, also into a matrix strided by rows."""
    a, out = _probe(device, operand)
    return _holds(lambda: torch.mm(a, a.T, out_dtype=torch.float32, out=out), out, a.float() @ a.float().T)


@functools.cache
def adds_wide(device: str, operand: torch.dtype) -> bool:
    """Whether torch.addmm adds such a product into an fp32 matrix in place here."""
    a, _ = _probe(device, operand)
    out = torch.ones(a.shape[0], a.shape[0], device=device)
    return _holds(lambda: torch.addmm(out, a, a.T, out_dtype=torch.float32, out=out), out, a.float() @ a.float().T + 1)


def _probe(device: str, operand: torch.dtype) -> tuple[Tensor, Tensor]:
    # Entries that both 16-bit types hold exactly, and sums of products that neither does: a rounded result shows.
    a = (1 + torch.arange(32, device=device).remainder(7)[:, None] / 64).to(operand).repeat(1, 32)
    return a, torch.zeros(32, 48, device=device)[:, :32]


def _holds(call: Callable[[], object], out: Tensor, want: Tensor) -> bool:
    try:
        call()
    except torch.OutOfMemoryError:
        raise  # a full device says nothing about the build, and must not be remembered as if it did
    except (RuntimeError, TypeError):  # refused by this build or device: the answer, not a failure
        return False
    return bool(torch.allclose(out, want, rtol=1e-5))
