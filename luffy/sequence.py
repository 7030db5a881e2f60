"""Sequence parallelism (Ulysses, arXiv 2309.14509): ranks that share a packed stream.

    outside attention   every rank holds T / s neighbouring tokens of the stream, all heads
    inside              every rank holds all T tokens, H / s heads          T tokens, H heads, s ranks

Attention per row, with shared prompts, is the same code on either side: it never sees that there are fewer heads. A
target belongs to the rank that holds the position which predicts it, so losses and counts add up over ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from luffy.attention import Layout, Segment
from luffy.errors import UserError
from luffy.packing import MicroBatch

PER_TARGET = ("source", "targets", "advantages", "loss_id", "is_trace", "token_weight", "sampler_logp", "row")

OPTIONAL = ("behaviour", "ref_logp", "returns")


def check_heads(config: Any, ranks: int) -> None:
    """Refuse ranks of a sequence that attention heads cannot be dealt to.

    Raises:
        UserError: heads are no multiple of ranks.
    """
    heads = config.num_attention_heads
    if heads % ranks:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise UserError(
            f"mesh.sequence: {ranks} ranks cannot share the model's {heads} attention heads; take one of "
            f"{', '.join(map(str, fitting))}"
        )


def slice_of(micro: MicroBatch, rank: int, group: dist.ProcessGroup | None) -> MicroBatch:
    """This rank's part of a micro-batch: the stream is padded to a multiple of the ranks by a segment of its own."""
    if group is None:
        return micro
    tokens, padded = micro.num_tokens, _padded(micro, group.size())
    segments = list(micro.layout.segments)
    if padded > tokens:
        segments.append(Segment(tokens, padded, []))
    fill = micro.token_ids.new_zeros(padded - tokens)
    first, last = _span(micro, rank, group.size())
    mine = holds(micro, rank, group.size())
    names = [*PER_TARGET, *(name for name in OPTIONAL if getattr(micro, name) is not None)]
    per_target = {name: getattr(micro, name)[mine] for name in names}
    per_target["source"] = per_target["source"] - first
    return MicroBatch(
        token_ids=torch.cat([micro.token_ids, fill])[first:last],
        positions=torch.cat([micro.positions, fill])[first:last],
        layout=Layout(segments, padded, group=group),
        rewards=micro.rewards,
        num_rows=micro.num_rows,
        **per_target,
    )


def holds(micro: MicroBatch, rank: int, ranks: int) -> Tensor:
    """[N] bool: the targets that `slice_of` leaves to a rank."""
    first, last = _span(micro, rank, ranks)
    return (micro.source >= first) & (micro.source < last)


def _span(micro: MicroBatch, rank: int, ranks: int) -> tuple[int, int]:
    share = _padded(micro, ranks) // ranks
    return share * rank, share * (rank + 1)


def _padded(micro: MicroBatch, ranks: int) -> int:
    return micro.num_tokens + -micro.num_tokens % ranks
