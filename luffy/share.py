"""A rank's share of rows, as micro-batches, and what all ranks say of all rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from luffy.balance import plan
from luffy.groups import Group, Row
from luffy.packing import MicroBatch, assemble, pack
from luffy.sequence import holds, slice_of

if TYPE_CHECKING:
    from luffy.setup import Trainer


def share_of(t: Trainer, groups: list[Group], rows_of: Callable[[Group], list[Row]]) -> list[MicroBatch]:
    """Of `rows_of(group)` of every group, on this rank's device; as many micro-batches as every other rank has."""
    packed = pack(
        groups,
        rows_of,
        t.config.train.tokens_per_micro,
        rank=t.world.data_rank,
        ranks=t.world.data_ranks,
        attention_weight=t.policy.attention_weight,
    )
    return [slice_of(micro, t.world.sequence_rank, t.world.sequence_group).to(t.device) for micro in packed]


@torch.no_grad()
def said_of(
    t: Trainer,
    groups: list[Group],
    rows_of: Callable[[Group], list[Row]],
    says: Callable[[MicroBatch], Tensor],
) -> list[Tensor]:
    """What `says` (a micro-batch -> [N, ...], on every rank) gives for the targets of each row of `rows_of(group)` of
    every group: [n, ...] float32 on the CPU, in the rows' order. Collective; every rank gets all of it."""
    rows = [row for group in groups for row in rows_of(group)]
    numbers = {id(row): n for n, row in enumerate(rows)}
    mine: list[tuple[int, Tensor]] = []
    for slot in plan(groups, rows_of, t.config.train.tokens_per_micro, t.world.data_ranks, t.policy.attention_weight):
        units = slot[t.world.data_rank]
        held = [row for unit in units for row in unit.rows]
        values = _whole(t, assemble(units), says).cpu().split([row.num_targets for row in held])
        mine += [(numbers[id(row)], part.clone()) for row, part in zip(held, values, strict=True)]
    known = dict(one for found in t.world.everyone(mine) for one in found)
    return [known[number] for number in range(len(rows))]


def _whole(t: Trainer, micro: MicroBatch, says: Callable[[MicroBatch], Tensor]) -> Tensor:
    """[N, ...] of all targets of a micro-batch, also where ranks share its tokens."""
    rank, group = t.world.sequence_rank, t.world.sequence_group
    said = says(slice_of(micro, rank, group).to(t.device)).float()
    if group is None:
        return said
    values = torch.zeros(micro.num_targets, *said.shape[1:], device=said.device)
    values[holds(micro, rank, group.size()).to(said.device)] = said
    dist.all_reduce(values, group=group)
    return values
