"""What the policy says of a micro-batch before its loss, and sums over rows that ranks may share.

N response tokens, R rows
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from luffy.correction import log_ratios
from luffy.packing import MicroBatch


@dataclass(frozen=True, slots=True)
class Seen:
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


def moved(seen: Seen, before: Tensor | None) -> Tensor:
    """[N] float64: log pi / pi_before of each token, within +-20; 0 where nobody sampled, or nothing has moved.

    before: [N] log-probs of those who sampled (NaN: nobody); None: the policy itself.
    """
    if before is None:
        return torch.zeros_like(seen.logp, dtype=torch.float64)
    return log_ratios(seen.logp, before).nan_to_num(0.0)
