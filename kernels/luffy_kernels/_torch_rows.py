"""Row arithmetic in plain torch, for any device and dtype, and its compiled shortcut on CPU.

At most two [C, V] buffers in the compute dtype (fp32, fp64 for fp64 operands), a third with a softcap, and one in the
operands' dtype where that is narrower exist; `chunk_rows` is the exact formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._chunks import LOWEST, Head, Stats, compute_dtype, finish, write_logits
from ._gemm import ieee_float32
from ._vocab import Merged


def fused(head: Head) -> bool:
    """Whether the compiled row kernels serve this head's chunks: exp(z - max) is then never stored."""
    operand = head.weight.dtype
    return head.softcap is None and head.weight.device.type == "cpu" and _native.has_row_kernels(operand)


def chunk_rows(head: Head, chunk_bytes: int) -> int:
    """Rows of a chunk, C = max(1, chunk_bytes // (V (k wide + narrow))), V of the largest shard.

    wide is the size of the compute dtype and narrow that of the operands where it is smaller, else 0. k is 2; 3 with a
    softcap; 1 where the compiled row kernels serve 16-bit operands.
    """
    operand = head.weight.dtype
    wide = compute_dtype(operand).itemsize
    narrow = operand.itemsize if operand.itemsize < wide else 0
    k = 1 if fused(head) and narrow else 2 if head.softcap is None else 3
    return max(1, chunk_bytes // max(1, head.widest * (k * wide + narrow)))


class Workspace:
    def __init__(self, rows: int, head: Head) -> None:
        operand, device, size = head.weight.dtype, head.weight.device, (rows, head.weight.shape[0])
        dtype = compute_dtype(operand)
        self.fused = fused(head)
        self.logits = torch.empty(size, dtype=dtype, device=device)
        self.narrow = None if operand == dtype else torch.empty(size, dtype=operand, device=device)
        stored = not (self.fused and self.narrow is not None)
        self.exp = torch.empty(size, dtype=dtype, device=device) if stored else None

    def spare(self, rows: int, operand: torch.dtype) -> Tensor:
        buffer = self.logits.view(operand).view(-1)
        return buffer[: rows * self.logits.shape[1]].view(rows, self.logits.shape[1])


workspace = Workspace


def row_stats(
    hidden: Tensor, rows: Tensor, targets: Tensor, head: Head, work: Workspace, average: bool = False
) -> Stats:
    z = work.logits[: hidden.shape[0]]
    write_logits(z, hidden, head)
    _transform(z, rows, head)
    exp = None
    if z.shape[1] == 0:  # a rank without entries
        exp, empty = z, z.new_zeros(z.shape[0])
        peak, total, mean = empty + LOWEST, empty, empty
    elif work.fused:
        peak, total, mean = torch.ops.luffy_kernels.center_rows_(z)
    else:
        peak = z.amax(-1)
        z.sub_(peak[:, None])
        assert work.exp is not None, "the workspace holds exp unless the row kernels are fused"
        exp = torch.exp(z, out=work.exp[: z.shape[0]])
        total = exp.sum(-1)
        with ieee_float32(z.device):
            mean = torch.bmm(exp[:, None, :], z[:, :, None]).view(-1) / total
    at, owned = head.locate(targets)
    target = z.gather(1, at[:, None]).squeeze(1) if z.shape[1] else torch.zeros_like(peak)
    flat = None if not average else z.mean(-1) if z.shape[1] else torch.zeros_like(peak)
    stats = finish(z, exp, Merged(peak, total, mean, target, flat), owned, head)
    if head.shard is not None:
        shift = (peak - stats.max)[:, None]
        z.add_(shift)
        if exp is not None:
            exp.mul_(shift.exp())
    return stats


def _transform(z: Tensor, rows: Tensor, head: Head) -> None:
    """h W^T -> softcap(logit_scale * (h W^T + b)) / temperature, in place."""
    if head.bias is not None:
        z.add_(head.bias).clamp_(min=LOWEST)
    scale = head.logit_scale / head.temperature[rows, None]
    if head.softcap is not None:
        z.mul_(head.logit_scale / head.softcap).tanh_()
        scale = head.softcap / head.temperature[rows, None]
    # On CPU a look at the scale is cheaper than a pass over the chunk.
    if z.device.type != "cpu" or not bool((scale == 1).all()):
        z.mul_(scale)
    if head.softcap is not None and head.bias is not None:  # the cap brought masked entries back as -softcap
        z.masked_fill_(head.bias == -torch.inf, LOWEST)


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
    count = stats.logp.shape[0]
    buffer = work.exp if work.narrow is None else work.narrow
    assert buffer is not None, "a workspace has exp or a narrow buffer"
    out, chain = buffer[:count], head.logit_scale / head.temperature[rows]
    if out.shape[1] == 0:
        return out
    # dz = exp (offset + slope centred), and one more factor, the cap's derivative, with a softcap.
    at, owned = head.locate(targets)
    at = at[:, None]
    flat = -g if lse is None else lse - g
    target_z = stats.logits.gather(1, at).squeeze(1)
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
        torch.ops.luffy_kernels.grad_rows(out, stats.logits, offset, slope)
        if flat_share is not None:
            out.add_(flat_share.to(out.dtype)[:, None])
    else:
        cap = None if head.softcap is None else _cap_derivative(stats, rows, head, head.softcap)
        if cap is not None:
            on_target = on_target * cap.gather(1, at).squeeze(1)
        if flat_share is not None:
            torch.addcmul(flat_share[:, None], stats.exp, offset[:, None], out=stats.exp)
        elif u is None:
            torch.mul(stats.exp, offset[:, None], out=stats.exp)
        else:
            torch.addcmul(offset[:, None], stats.logits, slope[:, None], out=stats.logits)
            torch.mul(stats.exp, stats.logits, out=stats.exp)
        if cap is not None:
            torch.mul(stats.exp, cap, out=stats.exp)
        if out.dtype != stats.exp.dtype:  # a product straight into a narrower type would widen a copy of it first
            out.copy_(stats.exp)
    # Rows whose target another rank holds keep what they have at entry 0. Not scatter_: on CPU it copies the whole of a
    # 16-bit matrix.
    here, at, kept = torch.arange(count, device=out.device), at.squeeze(1), on_target.to(out.dtype)
    out[here, at] = kept if head.shard is None else torch.where(owned, kept, out[here, at])
    return out


def _cap_derivative(stats: Stats, rows: Tensor, head: Head, softcap: float) -> Tensor:
    """[C, V] 1 - tanh^2, where tanh = z temperature / softcap with the maximum added back."""
    tanh = (stats.logits + stats.max[:, None]).mul_(head.temperature[rows, None] / softcap)
    return tanh.clamp_(-1, 1).square_().neg_().add_(1)  # masked entries lie far beyond the cap
