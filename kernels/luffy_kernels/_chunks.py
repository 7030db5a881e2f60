"""The chunk driver of the torch backend: logits of a block of rows, their statistics, their gradient, and two GEMMs.

    N rows, H hidden size, V vocabulary, C rows of a chunk

    z    = softcap(logit_scale * (h W^T + b)) / temperature
    e    = exp(z - max z)    s = sum_v e    mean = sum_v e (z - max z) / s
    dz   = g onehot(y) + e / s * (l - g - u (z - max z - mean))      with g = dL/dlogp, u = dL/dentropy, l = dL/dlse

At most two [C, V] buffers in the compute dtype (fp32, fp64 for fp64 operands), a third with a softcap, and one in the
operands' dtype where that is narrower exist; `chunk_rows` is the exact formula. Logits are centred before anything is
summed, so a large common offset costs no digits. Results do not depend on the chunk size beyond the rounding of a GEMM.
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
    fused_rows: bool  # the compiled row kernels serve this head's chunks, and exp(z - max) is never stored
    bias: Tensor | None  # [V], compute dtype
    temperature: Tensor  # [N], compute dtype
    softcap: float | None
    logit_scale: float


class Stats(NamedTuple):
    """Per-row statistics of a chunk. `centred` and `exp` are the two [C, V] buffers."""

    centred: Tensor  # [C, V] z - max
    exp: Tensor | None  # [C, V] exp(z - max); None where the compiled row kernels recompute it
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
    """Rows of a chunk, C = max(1, chunk_bytes // (V (k wide + narrow))).

    wide is the size of the compute dtype and narrow that of the operands where it is smaller, else 0. k is 2; 3 with a
    softcap; 1 where the compiled row kernels serve 16-bit operands.
    """
    operand = head.weight.dtype
    wide = compute_dtype(operand).itemsize
    narrow = operand.itemsize if operand.itemsize < wide else 0
    k = 1 if head.fused_rows and narrow else 2 if head.softcap is None else 3
    return max(1, chunk_bytes // (head.weight.shape[0] * (k * wide + narrow)))


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
    fused = softcap is None and weight.device.type == "cpu" and _native.has_row_kernels(operand)
    return Head(weight, wide, packed, fused, bias, temperature.detach().to(dtype).expand(rows), softcap, logit_scale)


class Workspace:
    """The [C, V] buffers of a sweep, allocated once and cut to each chunk."""

    def __init__(self, rows: int, head: Head) -> None:
        operand, device, size = head.weight.dtype, head.weight.device, (rows, head.weight.shape[0])
        dtype = compute_dtype(operand)
        self.logits = torch.empty(size, dtype=dtype, device=device)
        self.narrow = None if operand == dtype else torch.empty(size, dtype=operand, device=device)
        stored = not (head.fused_rows and self.narrow is not None)
        self.exp = torch.empty(size, dtype=dtype, device=device) if stored else None

    def spare(self, rows: int, operand: torch.dtype) -> Tensor:
        """[rows, V] in the operands' dtype over a buffer that the written dz no longer needs."""
        buffer = self.logits.view(operand).view(-1)
        return buffer[: rows * self.logits.shape[1]].view(rows, self.logits.shape[1])


def row_stats(hidden: Tensor, rows: Tensor, targets: Tensor, head: Head, work: Workspace) -> Stats:
    """GEMM and statistics of a chunk. hidden: [C, H] operands. rows: [C] indices of its tokens. targets: [C]."""
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
    # On CPU a look at the scale is cheaper than a pass over the chunk.
    if z.device.type != "cpu" or not bool((scale == 1).all()):
        z.mul_(scale)
    exp = None
    if head.fused_rows:
        peak, total, mean = torch.ops.luffy_kernels.center_rows_(z)
    else:
        peak = z.amax(-1)
        z.sub_(peak[:, None])
        assert work.exp is not None, "the workspace holds exp unless the row kernels are fused"
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
    uniform: Tensor | None = None,
) -> Tensor:
    """[C, V] gradient of h W^T + b in the operands' dtype. Overwrites the statistics' buffers.

    g, u, lse: [C] derivatives of the loss in logp, entropy and lse. uniform: [C] its derivative in every z alike.
    """
    count, at = stats.logp.shape[0], targets[:, None]
    buffer = work.exp if work.narrow is None else work.narrow
    assert buffer is not None, "a workspace has exp or a narrow buffer"
    out, chain = buffer[:count], head.logit_scale / head.temperature[rows]
    # dz = exp (offset + slope centred), and one more factor, the cap's derivative, with a softcap.
    flat = -g if lse is None else lse - g
    target_z = stats.centred.gather(1, at).squeeze(1)
    weight = flat if u is None else flat - u * (target_z - stats.mean)
    # The target's entry is written from fp32 scalars: 1 - p cancels, and a 16-bit p would leave nothing of it.
    on_target = (g + target_z.exp() / stats.sum * weight) * chain
    offset = (flat if u is None else flat + u * stats.mean) * chain / stats.sum
    slope = torch.zeros_like(offset) if u is None else -u * chain / stats.sum
    assert u is None or uniform is None, "no operator has an entropy term and label smoothing"
    flat_share = None if uniform is None else uniform * chain
    if flat_share is not None:
        on_target = on_target + flat_share
    if stats.exp is None:
        torch.ops.luffy_kernels.grad_rows(out, stats.centred, offset, slope)
        if flat_share is not None:
            out.add_(flat_share[:, None])
    else:
        cap = None if head.softcap is None else _cap_derivative(stats, rows, head, head.softcap)
        if cap is not None:
            on_target = on_target * cap.gather(1, at).squeeze(1)
        if flat_share is not None:
            torch.addcmul(flat_share[:, None], stats.exp, offset[:, None], out=stats.exp)
            torch.mul(stats.exp, 1.0 if cap is None else cap, out=out)
            cap = None
        elif u is None:
            torch.mul(stats.exp, offset[:, None], out=out if cap is None else stats.exp)
        else:
            torch.addcmul(offset[:, None], stats.centred, slope[:, None], out=stats.centred)
            torch.mul(stats.exp, stats.centred, out=out if cap is None else stats.exp)
        if cap is not None:
            torch.mul(stats.exp, cap, out=out)
    out[torch.arange(count, device=out.device), targets] = on_target.to(out.dtype)
    return out


def _cap_derivative(stats: Stats, rows: Tensor, head: Head, softcap: float) -> Tensor:
    """[C, V] 1 - tanh^2, where tanh = z temperature / softcap with the maximum added back."""
    tanh = (stats.centred + stats.max[:, None]).mul_(head.temperature[rows, None] / softcap)
    return tanh.square_().neg_().add_(1)


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
