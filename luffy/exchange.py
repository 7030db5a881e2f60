"""Tokens against heads: the two all-to-alls of sequence parallelism (see `luffy.sequence`).

T tokens, H heads, D their size, s ranks
"""

from math import gcd

import torch
import torch.distributed as dist
from torch import Tensor


class _Exchange(torch.autograd.Function):
    """Every rank cuts `split` into s pieces and gets one piece of each rank, side by side in `join`."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, split: int, join: int) -> Tensor:
        ctx.group, ctx.dims = group, (split, join)
        sent = torch.stack(x.chunk(group.size(), split))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return torch.cat(received.unbind(0), join)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        split, join = ctx.dims
        return _Exchange.apply(grad, ctx.group, join, split), None, None, None


def to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[1, H, T / s, D] -> [1, H / s, T, D]. Keys and values of fewer heads than ranks are repeated first."""
    ranks = group.size()
    repeats = ranks // gcd(x.shape[1], ranks)
    return _Exchange.apply(x.repeat_interleave(repeats, dim=1) if repeats > 1 else x, group, 1, 2)


def to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[1, H / s, T, D] -> [1, H, T / s, D]."""
    return _Exchange.apply(x, group, 2, 1)
