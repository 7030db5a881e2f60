"""Vocabulary-parallel heads by the signatures of Megatron and NeMo RL, for import where theirs stand.

    from luffy_kernels.compat.megatron import linear_cross_entropy                      # Megatron Core's fused head
    from luffy_kernels.compat.megatron import ChunkedDistributedHiddenStatesToLogprobs  # NeMo RL's, by its `.apply`

Ranks of the group hold parts of the vocabulary. With sequence parallelism they also hold parts of the tokens, one after
the other along the first dimension: these are gathered, and each rank gets the gradient of its own. A weight's gradient
is complete on the rank that holds it. NeMo RL's is not on PyPI and Megatron's not in a release there (0.16.1), so there
is no version to check and nothing to apply: both are tested against the semantics written in their sources.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import cross_entropy
from ..logprobs import linear_logprobs


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    reduction: Literal["none", "sum", "mean"] = "mean",
    ignore_index: int = -100,
    sequence_parallel: bool = False,
) -> Tensor:
    """Negative log-likelihood in nats, fp32: [N] or a scalar, the same on all ranks; mean over labels not ignored.

    Args:
        hidden: [..., H] float, the same on all ranks; with `sequence_parallel` this rank's part of the first dimension.
        weight: [V / ranks, H] float, parts in the order of ranks. labels: [...] integer, all of them, N in all.

    Raises:
        ValueError: what `luffy_kernels.linear_cross_entropy` raises.
    """
    if sequence_parallel:
        hidden = gathered(hidden, tp_group)
    group = spread(tp_group)
    return cross_entropy.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1).long(),
        reduction=reduction,
        ignore_index=ignore_index,
        tp_group=group,
        vocab_start=first_entry(group, weight),
    )


class ChunkedDistributedHiddenStatesToLogprobs:
    """NeMo RL's, of which its callers use `apply` alone."""

    @staticmethod
    def apply(
        tensor_parallel_hidden_states: Tensor,
        target: Tensor,
        output_weight_layer: Tensor,
        vocab_start_index: int,
        vocab_end_index: int,
        chunk_size: int | None,
        tp_group: dist.ProcessGroup | None,
        inference_only: bool = False,
    ) -> Tensor:
        """[B, S] log-probs, nats, fp32; differentiable unless `inference_only`.

        tensor_parallel_hidden_states: [S / ranks, B, H] float. target: [B, S] integer, shifted already.
        output_weight_layer: [V / ranks, H] float, entries from vocab_start_index on. vocab_end_index, chunk_size: taken
        and not needed.

        Raises:
            ValueError: what `luffy_kernels.linear_logprobs` raises.
        """
        hidden = gathered(tensor_parallel_hidden_states, tp_group).transpose(0, 1)
        return shard_logprobs(hidden, output_weight_layer, target, vocab_start_index, tp_group, inference_only)


def shard_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    vocab_start: int,
    group: dist.ProcessGroup | None,
    inference_only: bool,
) -> Tensor:
    """[B, S] log-probs, nats, fp32. hidden: [B, S, H], the same on all ranks; its gradient comes out summed over them.
    weight: [V / ranks, H], entries from `vocab_start` on. target: [B, S] integer."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only):
        return linear_logprobs(hidden, weight, target.long(), tp_group=spread(group), vocab_start=vocab_start).logp


def spread(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """A group of one spreads nothing, and has the faster backends."""
    return None if group is None or dist.get_world_size(group) == 1 else group


def first_entry(group: dist.ProcessGroup | None, weight: Tensor) -> int:
    """Of this rank's weight, [V / ranks, H], where ranks hold equal parts of the vocabulary in their order."""
    return 0 if group is None else dist.get_rank(group) * weight.shape[0]


def gathered(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[ranks * n, ...] along the first dimension; part: this rank's, [n, ...], as long as the others'."""
    return part if spread(group) is None else _Gathered.apply(part, group)


class _Gathered(torch.autograd.Function):
    """Backward takes this rank's part: the operator has summed the gradient over the ranks already."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.ranks = dist.get_rank(group), dist.get_world_size(group)
        parts = [torch.empty_like(part) for _ in range(ctx.ranks)]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.ranks)[ctx.rank], None


class Shared(torch.autograd.Function):
    """hidden for an operator that sums its gradient over the ranks, where whoever gathered hidden adds shares up: each
    rank's is the sum divided by their number."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, ranks: int) -> Tensor:
        """hidden [..., H] as it is."""
        ctx.ranks = ranks
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """grad [..., H], the sum over the ranks, divided by their number."""
        return grad / ctx.ranks, None
