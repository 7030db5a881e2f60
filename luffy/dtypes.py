"""Compute types by the names that a configuration has for them."""

from functools import cache
from typing import Literal, cast

import torch

Name = Literal["bfloat16", "float32"]


def resolve(name: str) -> Name:
    """`auto` is bfloat16 where the machine multiplies it: on a GPU, or a CPU for which oneDNN does (AVX-512 and later).
    Elsewhere torch falls back on loops that take up to fifty times as long as float32 (`docs/cpu-training.md`)."""
    if name != "auto":
        return cast(Name, name)
    return "bfloat16" if multiplies_bfloat16() else "float32"


def dtype_of(name: str) -> torch.dtype:
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[resolve(name)]


@cache
def multiplies_bfloat16() -> bool:
    return torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
