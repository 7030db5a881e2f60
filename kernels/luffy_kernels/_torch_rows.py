"""Row arithmetic in plain torch, for any device and dtype.

At most two [C, V] buffers in the compute dtype (fp32, fp64 for fp64 operands), a third with a softcap, and one in the
operands' dtype where that is narrower exist; `chunk_rows` is the exact formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._chunks import LOWEST, Gradients, Head, Stats, compute_dtype, finish, wide_weight, write_logits
from ._gemm import ieee_float32
from ._vocab import Merged


def chunk_rows(head: Head, chunk_bytes: int, keep: bool = True) -> int:
    """Rows of a chunk, C = max(1, chunk_bytes // (V (k wide + narrow))), V of the largest shard.

    wide is the size of the compute dtype and narrow that of the operands where it is smaller, else 0. k is 2; 3 with a
    softcap.
    """
    operand = head.weight.dtype
    wide = compute_dtype(operand).itemsize
    narrow = operand.itemsize if operand.itemsize < wide else 0
    k = 2 if head.softcap is None else 3
    return max(1, chunk_bytes // max(1, head.widest * (k * wide + narrow)))


PART = 4096


class Workspace:
    def __init__(self, rows: int, head: Head) -> None:
        operand, device, size = head.weight.dtype, head.weight.device, (rows, head.weight.shape[0])
        dtype = compute_dtype(operand)
        self.wide = wide_weight(head)
        self.logits = torch.empty(size, dtype=dtype, device=device)
        self.exp = torch.empty(size, dtype=dtype, device=device)
        self.narrow = None if operand == dtype else torch.empty(size, dtype=operand, device=device)

    def spare(self, rows: int, operand: torch.dtype) -> Tensor:
        buffer = self.logits.view(operand).view(-1)
        return buffer[: rows * self.logits.shape[1]].view(rows, self.logits.shape[1])


workspace = Workspace


def row_stats(
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    head: Head,
    work: Workspace,
    average: bool = False,
    keep: bool = True,
) -> Stats:
    z = work.logits[: hidden.shape[0]]
    write_logits(z, hidden, head, work.wide)
    _transform(z, rows, head)
    if z.shape[1] == 0:  # a rank without entries
        exp, empty = z, z.new_zeros(z.shape[0])
        peak, total, mean = empty + LOWEST, empty, empty
    else:
        peak = z.amax(-1)
        z.sub_(peak[:, None])
        exp = torch.exp(z, out=work.exp[: z.shape[0]])
        total = exp.sum(-1)
        # Parts of the vocabulary: the error of one long product would grow with it.
        with ieee_float32(z.device):
            parts = [
                torch.bmm(e[:, None, :], c[:, :, None]).view(-1)
                for e, c in zip(exp.split(PART, 1), z.split(PART, 1), strict=True)
            ]
        mean = torch.stack(parts).sum(0) / total
    at, owned = head.locate(targets)
    target = z.gather(1, at[:, None]).squeeze(1) if z.shape[1] else torch.zeros_like(peak)
    flat = None if not average else z.mean(-1) if z.shape[1] else torch.zeros_like(peak)
    stats = finish(z, exp, Merged(peak, total, mean, target, flat), owned, head)
    if head.shard is not None:
        shift = (peak - stats.max)[:, None]
        z.add_(shift)
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
    assert stats.exp is not None, "row_stats keeps exp"
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


def add_grads(
    stats: Stats,
    rows: Tensor,
    targets: Tensor,
    hidden: Tensor,
    g: Tensor,
    u: Tensor | None,
    lse: Tensor | None,
    head: Head,
    work: Workspace,
    grads: Gradients,
    uniform: Tensor | None = None,
) -> None:
    """Adds this chunk's gradients. On CPU rows that turned out zero enter no product; elsewhere their count would be a
    synchronisation per chunk."""
    dz = logits_grad(stats, rows, targets, g, u, lse, head, work, uniform)
    if dz.device.type == "cpu":
        keep = sum((x != 0 for x in (u, lse) if x is not None), g != 0).nonzero().view(-1)
        if len(keep) == 0:
            return
        if len(keep) < len(rows):
            dz = torch.index_select(dz, 0, keep, out=work.spare(len(keep), dz.dtype))
            hidden, rows = hidden[keep], rows[keep]
    grads.add(dz, hidden, rows, head)


def _cap_derivative(stats: Stats, rows: Tensor, head: Head, softcap: float) -> Tensor:
    """[C, V] 1 - tanh^2, where tanh = z temperature / softcap with the maximum added back."""
    tanh = (stats.logits + stats.max[:, None]).mul_(head.temperature[rows, None] / softcap)
    return tanh.clamp_(-1, 1).square_().neg_().add_(1)  # masked entries lie far beyond the cap
