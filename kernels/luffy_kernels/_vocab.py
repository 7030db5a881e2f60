"""A head whose vocabulary is spread over ranks: each holds some rows of the weight, all hold the same tokens.

Only statistics travel: seven numbers per token, gathered and merged in rank order, so all ranks compute the same bits.
Every rank must make the same calls with the same hidden, targets and per-token arguments. The gradient of hidden is
summed over the ranks once, inside the operator; the caller must not reduce it again. A weight shard's is complete.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._checks import require


class Shard(NamedTuple):
    """What a rank holds, and what all hold together."""

    group: dist.ProcessGroup
    start: int  # first vocabulary entry of this rank
    total: int  # entries of all ranks
    widest: int  # entries of the largest shard: chunks derive from it, or ranks would disagree on their number


def make_shard(op: str, group_name: str | None, start: int, size: int, device: torch.device) -> Shard | None:
    """Agrees on the layout: one small all-gather (and, on a device, one synchronisation) per call."""
    if group_name is None:
        require(start == 0, op, "vocab_start", "0 without tp_group", start)
        return None
    group = dist.distributed_c10d._resolve_process_group(dist.distributed_c10d.GroupName(group_name))
    mine = torch.tensor([start, size], device=device)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    layout = sorted(tuple(x.tolist()) for x in everyone)
    end = 0
    for first, count in layout:
        require(first == end, op, "vocab_start", f"{end} for one of the ranks (no gap, no overlap)", layout)
        end += count
    return Shard(group, start, end, max(count for _, count in layout))


def group_name(op: str, group: dist.ProcessGroup | None) -> str | None:
    """The name under which a schema can carry the group."""
    if group is None:
        return None
    require(isinstance(group, dist.ProcessGroup), op, "tp_group", "a ProcessGroup", type(group).__name__)
    return group.group_name


class Merged(NamedTuple):
    max: Tensor
    sum: Tensor
    mean: Tensor
    target: Tensor
    average: Tensor | None


def merge(shard: Shard, size: int, local: Merged, owned: Tensor) -> Merged:
    """Statistics over the whole vocabulary from those over this rank's `size` entries. [C] each.

    max, sum, mean, average: as in `_chunks.Stats`, centred by the local maximum. target: the target's centred
    logit where `owned`, else anything. What comes back is centred by the global maximum.
    """
    # An absent average must travel too: all ranks must send as many numbers.
    average = torch.zeros_like(local.max) if local.average is None else local.average
    count = torch.full_like(local.max, size)
    mine = torch.stack([local.max, local.sum, local.mean, torch.where(owned, local.target, 0.0), average, count])
    mine = torch.cat([mine, owned[None].to(mine.dtype)]).contiguous()
    everyone = [torch.empty_like(mine) for _ in range(shard.group.size())]
    dist.all_gather(everyone, mine, group=shard.group)
    peak = torch.stack([x[0] for x in everyone]).amax(0)
    total, weighted, target, flat, owners = (torch.zeros_like(peak) for _ in range(5))
    for top, part, mean, logit, average, entries, here in everyone:
        shift = top - peak
        part = part * shift.exp()
        total = total + part
        weighted = weighted + part * (mean + shift)
        target = target + here * (logit + shift)
        flat = flat + entries * (average + shift)
        owners = owners + here
    target = torch.where(owners == 1, target, torch.nan)
    return Merged(peak, total, weighted / total, target, None if local.average is None else flat / shard.total)


def sum_over(shard: Shard | None, gradient: Tensor | None) -> None:
    """Sums the gradient of hidden over the ranks, in place."""
    if shard is not None and gradient is not None:
        dist.all_reduce(gradient, group=shard.group)
