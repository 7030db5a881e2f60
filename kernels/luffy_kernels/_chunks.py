"""The chunk driver: logits of a block of rows, statistics, gradient, two GEMMs.

    N rows, H hidden size, V vocabulary, C rows of a chunk

    z    = softcap(logit_scale * (h W^T + b)) / temperature
    e    = exp(z - max z)    s = sum_v e    mean = sum_v e (z - max z) / s
    dz   = g onehot(y) + e / s * (l - g - u (z - max z - mean))      with g = dL/dlogp, u = dL/dentropy, l = dL/dlse

What a chunk needs of [C, V] arithmetic is a `RowKernels`: `_torch_rows` in plain torch, `_cpp_rows` compiled for CPUs,
`_triton.rows` for devices. Logits are centred before anything is summed, so a large common offset costs no digits.
Results do not depend on the chunk size beyond the rounding of a GEMM.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import _gemm, _native, _vocab
from ._checks import positive

# Small enough to sit beside a model on a laptop, large enough that the GEMMs of a chunk run near full speed.
DEFAULT_CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
BLOCK = 64  # rows of a tile
# exp(LOWEST) is 0 and 0 * LOWEST is 0, where -inf would give NaN: masked vocabulary entries (bias = -inf).
LOWEST = -1e30


class Head(NamedTuple):
    """The linear head, as every chunk sees it."""

    weight: Tensor  # [V, H], operand dtype
    bias: Tensor | None  # [V], compute dtype
    temperature: Tensor  # [N], compute dtype
    softcap: float | None
    logit_scale: float
    shard: _vocab.Shard | None  # of a vocabulary that is spread over ranks

    @property
    def vocabulary(self) -> int:
        """Entries of the whole vocabulary."""
        return self.weight.shape[0] if self.shard is None else self.shard.total

    @property
    def widest(self) -> int:
        """Entries of the largest shard: what chunk sizes derive from, so that all ranks have the same chunks."""
        return self.weight.shape[0] if self.shard is None else self.shard.widest

    def locate(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of this weight that hold the targets (0 elsewhere), and where this weight holds them. [C] each."""
        local = targets if self.shard is None else targets - self.shard.start
        owned = (local >= 0) & (local < self.weight.shape[0])
        return torch.where(owned, local, 0), owned


class Stats(NamedTuple):
    """Per-row statistics of a chunk, over the whole vocabulary."""

    logits: Any  # [C, V] in the form that these row kernels keep for their gradients
    exp: Tensor | None  # [C, V] exp(z - max), where it is kept
    max: Tensor  # [C]
    sum: Tensor  # [C] sum_v exp
    mean: Tensor  # [C] E_p[z - max]
    logp: Tensor  # [C]; NaN where the target is outside the vocabulary
    gap: Tensor  # [C] z_target - max
    average: Tensor | None  # [C] mean_v (z - max), when asked for

    @property
    def entropy(self) -> Tensor:
        return self.sum.log() - self.mean

    @property
    def lse(self) -> Tensor:
        return self.max + self.sum.log()


class RowKernels(Protocol):
    """The [C, V] arithmetic of a chunk. rows: [C] indices of its tokens. targets: [C]. hidden: [C, H] operands.

    keep: whether `add_grads` will follow. `work` is what `workspace` made: the [C, V] buffers of a sweep, allocated
    once and cut to each chunk.
    """

    def chunk_rows(self, head: Head, chunk_bytes: int, keep: bool = True) -> int: ...

    def workspace(self, rows: int, head: Head) -> Any: ...

    def row_stats(
        self,
        hidden: Tensor,
        rows: Tensor,
        targets: Tensor,
        head: Head,
        work: Any,
        average: bool = False,
        keep: bool = True,
    ) -> Stats:
        """GEMM and statistics of a chunk."""

    def add_grads(
        self,
        stats: Stats,
        rows: Tensor,
        targets: Tensor,
        hidden: Tensor,
        g: Tensor,
        u: Tensor | None,
        lse: Tensor | None,
        head: Head,
        work: Any,
        grads: Gradients,
        uniform: Tensor | None = None,
    ) -> None:
        """Adds the chunk's gradients to `grads`. Overwrites what `row_stats` kept.

        g, u, lse: [C] derivatives of the loss in logp, entropy and lse. uniform: [C] its derivative in every z alike.
        """


def compute_dtype(operand: torch.dtype) -> torch.dtype:
    return torch.float64 if operand == torch.float64 else torch.float32


def balanced(count: int, most: int) -> Iterator[slice]:
    """Slices of at most `most` rows and equal size, so that the last chunk is no sliver. Whole blocks of `BLOCK` rows
    where `most` is: a part of one would cost as much as all of it."""
    if count == 0:
        return
    chunks = -(-count // most)
    size = -(-count // chunks)
    size += -size % BLOCK if most % BLOCK == 0 else 0
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def make_head(
    op: str,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float | None,
    logit_scale: float,
    operand: torch.dtype,
    rows: int,
    tp_group: str | None = None,
    vocab_start: int = 0,
) -> Head:
    """Converts what every chunk shares once. `rows` is N, for a temperature that is one number."""
    dtype = compute_dtype(operand)
    shard = _vocab.make_shard(op, tp_group, vocab_start, weight.shape[0], weight.device)
    weight = weight.detach().to(operand)
    bias = None if bias is None else bias.detach().to(dtype)
    temperature = positive(temperature.detach().to(dtype)).expand(rows)
    return Head(weight, bias, temperature, softcap, logit_scale, shard)


def wide_weight(head: Head) -> Tensor | None:
    """The weight in the compute dtype, where no product here widens on its own."""
    dtype, operand = compute_dtype(head.weight.dtype), head.weight.dtype
    return None if dtype == operand or _gemm.widens(head.weight.device.type, operand) else head.weight.to(dtype)


def write_logits(out: Tensor, hidden: Tensor, head: Head, wide: Tensor | None) -> None:
    """out [C, V] = hidden W^T in the compute dtype; out may be strided by rows. wide: `wide_weight` of the head."""
    if wide is None:
        _gemm.widen(out, hidden, head.weight.T)
    else:
        _gemm.widen(out, hidden.to(out.dtype), wide.T)


def finish(logits: Tensor, exp: Tensor | None, local: _vocab.Merged, owned: Tensor, head: Head) -> Stats:
    """Statistics of a chunk from those over this rank's entries, which are centred by its own maximum."""
    if head.shard is None:
        whole = local._replace(target=torch.where(owned, local.target, torch.nan))
    else:
        whole = _vocab.merge(head.shard, head.weight.shape[0], local, owned)
    logp = whole.target - whole.sum.log()
    return Stats(logits, exp, whole.max, whole.sum, whole.mean, logp, whole.target, whole.average)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in this dtype, in one pass and out of place: a second backward finds the gradient as it was."""
    factor = factor.to(gradient.device)
    if gradient.dtype == torch.float32 and _native.scales(gradient.device.type):
        return _native.OPS.scaled(gradient, factor, dtype)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


class Gradients:
    """What a sweep accumulates: dh rows in place, dW and db in the compute dtype, whatever the number of chunks."""

    def __init__(self, hidden: Tensor, head: Head, need: tuple[bool, bool, bool]) -> None:
        dtype = compute_dtype(head.weight.dtype)
        # A rank's share of dh is a partial sum: it stays in the compute dtype until the ranks have been added up.
        narrow = head.weight.dtype if head.shard is None else dtype
        self.hidden = hidden.new_zeros(hidden.shape, dtype=narrow) if need[0] else None
        # Rows one after another, however the weight's own lie: the compiled products write nothing else.
        empty = head.weight.new_empty(head.weight.shape if need[1] else (0,), dtype=dtype)
        self.weight = _native.on_large_pages(empty) if need[1] else None
        self.fresh = True  # dW holds nothing yet: the first product is written, not added to zeros
        self.bias = head.weight.new_zeros(head.weight.shape[0], dtype=dtype) if need[2] else None

    def all(self, head: Head) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        _vocab.sum_over(head.shard, self.hidden)
        if self.weight is not None and self.fresh:
            self.weight.zero_()
        return None if self.hidden is None else self.hidden.to(head.weight.dtype), self.weight, self.bias

    def add(self, dz: Tensor, hidden: Tensor, rows: Tensor, head: Head) -> None:
        """dz [C, V] and hidden [C, H] of the rows with these indices."""
        if self.hidden is not None:
            with _gemm.ieee_float32(dz.device):
                self.hidden[rows] = (dz @ head.weight).to(self.hidden.dtype)
        if self.weight is not None:
            _gemm.accumulate(self.weight, dz.T, hidden, fresh=self.fresh)
            self.fresh = False
        if self.bias is not None:
            self.bias.add_(dz.sum(0, dtype=self.bias.dtype))


def fake_grads(hidden: Tensor, weight: Tensor, dtype: torch.dtype, need: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """What a sweep returns of `Gradients.all`, for tracing: empty where not needed. dtype: the compute dtype."""
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    return (
        hidden.new_empty(hidden.shape, dtype=operand) if need[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape, dtype=dtype) if need[1] else hidden.new_empty(0),
        weight.new_empty(weight.shape[0], dtype=dtype) if need[2] else hidden.new_empty(0),
    )
