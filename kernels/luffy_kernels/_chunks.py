"""The chunk driver of the torch backend: logits of a block of rows, their statistics, their gradient, and two GEMMs.

    N rows, H hidden size, V vocabulary, C rows of a chunk

    z    = softcap(logit_scale * (h W^T + b)) / temperature
    e    = exp(z - max z)    s = sum_v e    mean = sum_v e (z - max z) / s
    dz   = g onehot(y) + e / s * (l - g - u (z - max z - mean))      with g = dL/dlogp, u = dL/dentropy, l = dL/dlse

Only two [C, V] buffers in the compute dtype (fp32, fp64 for fp64 operands) and one in the operands' dtype exist; where
the two dtypes agree the third is not needed. Logits are centred before anything is summed, so a large common offset
costs no digits. Results do not depend on the chunk size beyond the rounding of a GEMM.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native

# Small enough to sit beside a model on a laptop, large enough that the GEMMs of a chunk run near full speed.
DEFAULT_CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
# exp(LOWEST) is 0 and 0 * LOWEST is 0, where -inf would give NaN: masked vocabulary entries (bias = -inf).
LOWEST = -1e30


class Head(NamedTuple):
    """The linear head, as every chunk sees it."""

    weight: Tensor  # [V, H], operand dtype
    wide: Tensor | None  # [V, H], the weight in the compute dtype, where no GEMM here widens on its own
    packed: Tensor | None  # the weight in the layout of the compiled widening GEMM
    bias: Tensor | None  # [V], compute dtype
    temperature: Tensor  # [N], compute dtype
    softcap: float | None
    logit_scale: float


class Stats(NamedTuple):
    """Per-row statistics of a chunk. `centred` and `exp` are the two [C, V] buffers."""

    centred: Tensor  # [C, V] z - max
    exp: Tensor  # [C, V] exp(z - max)
    max: Tensor  # [C]
    sum: Tensor  # [C] sum_v exp
    mean: Tensor  # [C] E_p[z - max]
    logp: Tensor  # [C]

    @property
    def entropy(self) -> Tensor:
        return self.sum.log() - self.mean

    @property
    def lse(self) -> Tensor:
        return self.max + self.sum.log()


def compute_dtype(operand: torch.dtype) -> torch.dtype:
    return torch.float64 if operand == torch.float64 else torch.float32


def chunk_rows(head: Head, chunk_bytes: int) -> int:
    """Rows of a chunk, C = max(1, chunk_bytes // (V (k wide + narrow))), k = 2, or 3 with a softcap.

    wide is the size of the compute dtype and narrow that of the operands where it is smaller, else 0.
    """
    operand = head.weight.dtype
    wide = compute_dtype(operand).itemsize
    narrow = operand.itemsize if operand.itemsize < wide else 0
    return max(1, chunk_bytes // (head.weight.shape[0] * ((2 if head.softcap is None else 3) * wide + narrow)))


def balanced(count: int, most: int) -> Iterator[slice]:
    """Slices of at most `most` rows and equal size, so that the last chunk is no sliver."""
    if count == 0:
        return
    chunks = -(-count // most)
    size = -(-count // chunks)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def make_head(
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float | None,
    logit_scale: float,
    operand: torch.dtype,
    rows: int,
) -> Head:
    """Converts what every chunk shares once. `rows` is N, for a temperature that is one number."""
    dtype = compute_dtype(operand)
    weight = weight.detach().to(operand)
    wide = packed = None
    if weight.device.type == "cpu" and dtype != operand:
        if _native.has_wide_mm(operand, weight.shape[1]):
            packed = torch.ops.luffy_kernels.wide_pack(weight.contiguous())
        else:
            wide = weight.to(dtype)
    bias = None if bias is None else bias.detach().to(dtype)
    return Head(weight, wide, packed, bias, temperature.detach().to(dtype).expand(rows), softcap, logit_scale)


class Workspace:
    """The [C, V] buffers of a sweep, allocated once and cut to each chunk."""

    def __init__(self, rows: int, head: Head) -> None:
        operand, device, size = head.weight.dtype, head.weight.device, (rows, head.weight.shape[0])
        dtype = compute_dtype(operand)
        self.logits = torch.empty(size, dtype=dtype, device=device)
        self.exp = torch.empty(size, dtype=dtype, device=device)
        self.narrow = None if operand == dtype else torch.empty(size, dtype=operand, device=device)

    def spare(self, rows: int, operand: torch.dtype) -> Tensor:
        """[rows, V] in the operands' dtype over a buffer that the written dz no longer needs."""
        buffer = self.logits if self.narrow is None else self.exp
        return buffer.view(operand).view(-1)[: rows * buffer.shape[1]].view(rows, buffer.shape[1])


def row_stats(hidden: Tensor, rows: Tensor, targets: Tensor, head: Head, work: Workspace) -> Stats:
    """GEMM and statistics of a chunk. hidden: [C, H], operands' dtype. rows: [C] indices of its tokens. targets: [C]."""
    z = work.logits[: hidden.shape[0]]
    if head.packed is not None:
        torch.ops.luffy_kernels.wide_mm(z, hidden, head.packed)
    elif head.wide is not None:
        torch.mm(hidden.to(z.dtype), head.wide.T, out=z)
    elif head.weight.dtype == z.dtype:
        torch.mm(hidden, head.weight.T, out=z)
    else:
        torch.mm(hidden, head.weight.T, out_dtype=z.dtype, out=z)
    if head.bias is not None:
        z.add_(head.bias).clamp_(min=LOWEST)
    scale = head.logit_scale / head.temperature[rows, None]
    if head.softcap is not None:
        z.mul_(head.logit_scale / head.softcap).tanh_()
        scale = head.softcap / head.temperature[rows, None]
    z.mul_(scale)
    peak = z.amax(-1)
    z.sub_(peak[:, None])
    exp = torch.exp(z, out=work.exp[: z.shape[0]])
    total = exp.sum(-1)
    mean = torch.bmm(exp[:, None, :], z[:, :, None]).view(-1) / total
    logp = z.gather(1, targets[:, None]).squeeze(1) - total.log()
    return Stats(z, exp, peak, total, mean, logp)


def logits_grad(
    stats: Stats,
    rows: Tensor,
    targets: Tensor,
    g: Tensor,
    u: Tensor | None,
    lse: Tensor | None,
    head: Head,
    work: Workspace,
) -> Tensor:
    """[C, V] gradient of h W^T + b in the operands' dtype. Overwrites the statistics' buffers."""
    count, at = stats.logp.shape[0], targets[:, None]
    out = stats.exp if work.narrow is None else work.narrow[:count]
    chain = head.logit_scale / head.temperature[rows]
    flat = -g if lse is None else lse - g
    slope = None
    if head.softcap is not None:
        # d softcap(a)/da = 1 - tanh^2; tanh = z temperature / softcap with the maximum added back.
        tanh = (stats.centred + stats.max[:, None]).mul_(head.temperature[rows, None] / head.softcap)
        slope = tanh.square_().neg_().add_(1)
    target_z, target_exp = stats.centred.gather(1, at).squeeze(1), stats.exp.gather(1, at).squeeze(1)
    weight = flat if u is None else flat - u * (target_z - stats.mean)
    # The target's entry is written from fp32 scalars: 1 - p cancels, and a 16-bit p would leave nothing of it.
    on_target = (g + target_exp / stats.sum * weight) * chain
    if u is None:
        torch.mul(stats.exp, (flat * chain / stats.sum)[:, None], out=out if slope is None else stats.exp)
    else:
        per_z, offset = -u * chain / stats.sum, (flat + u * stats.mean) * chain / stats.sum
        torch.addcmul(offset[:, None], stats.centred, per_z[:, None], out=stats.centred)
        torch.mul(stats.exp, stats.centred, out=out if slope is None else stats.exp)
    if slope is not None:
        on_target = on_target * slope.gather(1, at).squeeze(1)
        torch.mul(stats.exp, slope, out=out)
    return out.scatter_(1, at, on_target[:, None].to(out.dtype))


class Gradients:
    """What a sweep accumulates: dh rows in place, dW and db in the compute dtype, whatever the number of chunks."""

    def __init__(self, hidden: Tensor, head: Head, need: tuple[bool, bool, bool]) -> None:
        dtype = compute_dtype(head.weight.dtype)
        self.hidden = hidden.new_zeros(hidden.shape, dtype=head.weight.dtype) if need[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=dtype) if need[1] else None
        self.bias = head.weight.new_zeros(head.weight.shape[0], dtype=dtype) if need[2] else None

    def all(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, self.weight, self.bias

    def add(self, dz: Tensor, hidden: Tensor, rows: Tensor, head: Head) -> None:
        """dz [C, V] and hidden [C, H] of the rows with these indices."""
        if self.hidden is not None:
            self.hidden[rows] = dz @ head.weight
        if self.weight is not None:
            if dz.dtype == self.weight.dtype:
                self.weight.addmm_(dz.T, hidden)
            elif head.packed is not None:
                torch.ops.luffy_kernels.wide_addmm_t(self.weight, dz, hidden)
            else:
                self.weight.add_(dz.T @ hidden)
        if self.bias is not None:
            self.bias.add_(dz.sum(0, dtype=self.bias.dtype))
