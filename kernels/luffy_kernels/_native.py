"""The compiled CPU library: schemas of its kernels, loading, and what it offers here.

The schemas live here and the library only registers kernels for them, so a missing library is a value (`error`), not an
import failure, and calling a kernel without it raises NotImplementedError instead of falling back.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

NAMESPACE = str(__package__)
"""Of the operators: luffy_kernels, or what a loader called the package, so that two copies in a process do not meet."""
_SCHEMAS = (
    "head_sweep(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor temperature, float? softcap,"
    " float logit_scale, bool flat, Tensor(a!)? exps) -> Tensor",
    "exps_sums(Tensor exps, Tensor factor, int vocabulary) -> Tensor",
    "shape_exps_(Tensor(a!) exps, Tensor targets, int vocabulary, Tensor coefficients, float? softcap) -> Tensor(a!)",
    "head_grads(Tensor exps, Tensor hidden, Tensor weight, Tensor targets, Tensor scale, Tensor on_target,"
    " bool need_dh, Tensor(a!)? dw, Tensor(b!)? db, bool fresh) -> Tensor",
    "head_plan(int tokens, int width, int vocabulary, int word, int threads) -> int[]",
    "bf16_words(Tensor weight) -> bool",
    "use_large_pages_(Tensor(a!) buffer) -> ()",
    "scaled(Tensor x, Tensor factor, ScalarType dtype) -> Tensor",
    "tile_isa() -> str",
    "tile_exp(Tensor x) -> Tensor",
    "tile_log(Tensor x) -> Tensor",
)
for _schema in _SCHEMAS:
    torch.library.define(f"{NAMESPACE}::{_schema.split('(')[0]}", "(" + _schema.split("(", 1)[1])


OPS = getattr(torch.ops, NAMESPACE)


@torch.library.register_fake(f"{NAMESPACE}::scaled")  # the one that a traced backward meets
def _(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


BUILD = "pip install --no-build-isolation --no-deps . in luffy-rl's sources, with scikit-build-core, cmake and GCC"


def _load() -> str | None:
    # An editable install keeps the library in site-packages and the sources elsewhere: __path__ knows both places.
    folders = [Path(folder) for folder in __import__(__package__).__path__]
    found = [folder / "_C.so" for folder in folders if (folder / "_C.so").exists()]
    if not found:
        return f"the compiled library is not installed; build it: {BUILD}"
    stamp = found[0].with_suffix(".torch")
    built = stamp.read_text().strip() if stamp.exists() else torch.__version__
    if built.split(".")[:2] != torch.__version__.split(".")[:2]:  # it might load, and then read other structures
        return (
            f"the compiled library is built for torch {built} and this is {torch.__version__}; build it again: {BUILD}"
        )
    try:
        torch.ops.load_library(found[0])
    except OSError as reason:
        return f"the compiled library does not load ({reason}); build it again: {BUILD}"
    return None


error = _load()


@torch.library.impl(f"{NAMESPACE}::scaled", "CUDA")
def _(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    from ._triton.scaled import scaled  # late: a CPU needs no Triton

    return scaled(x, factor, dtype)


@functools.cache
def scales(device: str) -> bool:
    """Whether `scaled` has a kernel for devices of this type."""
    return error is None if device == "cpu" else device == "cuda" and find_spec("triton") is not None


def on_large_pages(buffer: Tensor) -> Tensor:
    """The same buffer, not touched yet: on CPU its memory will come in large pages where the system gives them."""
    if error is None and buffer.device.type == "cpu":
        OPS.use_large_pages_(buffer)
    return buffer
