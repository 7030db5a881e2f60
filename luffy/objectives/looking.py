"""What the policy says of a micro-batch before its loss, and sums over rows that ranks may share.

N response tokens, R rows
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from luffy.correction import log_ratios
from luffy.packing import MicroBatch


@dataclass(frozen=True, slots=True)
class Seen:
    """Of the targets of a micro-batch, without a gradient."""

    logp: Tensor
    """[N] float32, nats, of the policy as it is."""
    entropy: Tensor | None
    """[N] float32, nats, where the objective looks at it."""


def row_sums(values: Tensor, micro: MicroBatch) -> Tensor:
    """[R] float64: the sum of these [N] values over each row, whichever rank holds its tokens."""
    assert micro.row is not None
    sums = torch.zeros(micro.num_rows, dtype=torch.float64, device=values.device)
    sums.index_add_(0, micro.row, values.double())
    if micro.layout.group is not None and micro.num_rows:
        dist.all_reduce(sums, group=micro.layout.group)
    return sums


def row_lengths(micro: MicroBatch) -> Tensor:
    """[R] float64: response tokens of each row."""
    return row_sums(torch.ones_like(micro.advantages), micro)


def highest(values: Tensor, among: Tensor, micro: MicroBatch, share: float) -> Tensor:
    """[N] bool: of each row, the `share` of its tokens `among` [N] whose values are highest, rounded up; equals of the
    lowest of them too. Whichever ranks hold the row's tokens."""
    assert micro.row is not None
    rows, found = _of_all_ranks(micro.row[among], micro), _of_all_ranks(values[among].double(), micro)
    least = torch.full((micro.num_rows,), float("inf"), dtype=torch.float64, device=values.device)
    for row in rows.unique().tolist():
        mine = found[rows == row]
        least[row] = mine.topk(min(len(mine), math.ceil(share * len(mine)))).values.min() if share else float("inf")
    return among & (values.double() >= least[micro.row])


def _of_all_ranks(values: Tensor, micro: MicroBatch) -> Tensor:
    """[n] on this rank -> those of all that share the micro-batch's tokens."""
    if micro.layout.group is None:
        return values
    ranks = dist.get_world_size(micro.layout.group)
    sizes = [values.new_empty(1, dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([len(values)], device=values.device), group=micro.layout.group)
    parts = [values.new_empty(int(max(sizes))) for _ in range(ranks)]
    padded = torch.cat([values, values.new_zeros(int(max(sizes)) - len(values))])
    dist.all_gather(parts, padded, group=micro.layout.group)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def moved(seen: Seen, before: Tensor | None) -> Tensor:
    """[N] float64, nats: log pi / pi_before of each token, within +-20; 0 where nobody sampled, or nothing has moved.

    before: [N] log-probs of those who sampled (NaN: nobody); None: the policy itself.
    """
    if before is None:
        return torch.zeros_like(seen.logp, dtype=torch.float64)
    return log_ratios(seen.logp, before).nan_to_num(0.0)
