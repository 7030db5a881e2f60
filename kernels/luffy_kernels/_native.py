"""The compiled CPU library: schemas of its kernels, loading, and what it offers here.

The schemas live here and the library only registers kernels for them, so a missing library is a value (`error`), not an
import failure, and calling a kernel without it raises NotImplementedError instead of falling back.
"""

from __future__ import annotations

from pathlib import Path

import torch

_SCHEMAS = (
    "logprobs_cpp_rows(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor temperature, float? softcap,"
    " float logit_scale) -> (Tensor, Tensor, Tensor)",
    "wide_supported(int width) -> bool",
    "wide_pack(Tensor weight) -> Tensor",
    "wide_mm(Tensor(a!) out, Tensor a, Tensor packed) -> Tensor(a!)",
    "center_rows_(Tensor(a!) z) -> (Tensor, Tensor, Tensor)",
    "grad_rows(Tensor(a!) out, Tensor centred, Tensor offset, Tensor slope) -> Tensor(a!)",
    "wide_addmm_t(Tensor(a!) out, Tensor dz, Tensor h) -> Tensor(a!)",
)
for _schema in _SCHEMAS:
    torch.library.define(f"luffy_kernels::{_schema.split('(')[0]}", "(" + _schema.split("(", 1)[1])


def _load() -> str | None:
    # An editable install keeps the library in site-packages and the sources elsewhere: __path__ knows both places.
    folders = [Path(folder) for folder in __import__(__package__).__path__]
    found = [folder / "_C.so" for folder in folders if (folder / "_C.so").exists()]
    if not found:
        return "the compiled library is not installed; build it with pip install --no-build-isolation -e ."
    try:
        torch.ops.load_library(found[0])
    except OSError as reason:  # built against another torch
        return f"the compiled library does not load: {reason}"
    return None


error = _load()


def has_row_kernels(operand: torch.dtype) -> bool:
    """Whether the compiled row kernels serve a chunk of these operands on CPU."""
    return error is None and operand in (torch.bfloat16, torch.float32)


def has_wide_mm(operand: torch.dtype, width: int) -> bool:
    """Whether bf16 x bf16 -> fp32 products run on this CPU's matrix or dot-product units."""
    return error is None and operand == torch.bfloat16 and torch.ops.luffy_kernels.wide_supported(width)
