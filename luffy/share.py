"""A rank's share of rows, as micro-batches."""

from collections.abc import Callable

from luffy.groups import Group, Row
from luffy.packing import MicroBatch, pack
from luffy.sequence import slice_of
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
