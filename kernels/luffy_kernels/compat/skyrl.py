"""SkyRL's fused head of its Megatron workers by this package's operator.

    from luffy_kernels.compat import skyrl
    skyrl.apply()        # in every worker, before the model runs; trainer...fused_lm_head_logprob_backend = "torch"

or by import, with SkyRL's signature: `FusedLinearChunkedDistributedLogprob`. The gradient of hidden is a rank's share,
as SkyRL's is: whoever gathered hidden adds the shares up.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._patch import Patch, Replacement
from .megatron import shard_logprobs, spread


class FusedLinearChunkedDistributedLogprob:
    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        vocab_start_index: int,
        vocab_end_index: int,
        chunk_size: int,
        tp_group: dist.ProcessGroup | None,
        inference_only: bool = False,
    ) -> Tensor:
        """[B, S] log-probs, nats, fp32, the same on all ranks; differentiable unless `inference_only`.

        hidden: [B, S, H], the same on all ranks. weight: [V / ranks, H], entries from vocab_start_index on. target:
        [B, S], shifted already. chunk_size: taken and not needed.
        """
        if spread(tp_group) is not None:
            hidden = _Shared.apply(hidden, dist.get_world_size(tp_group))
        return shard_logprobs(hidden, weight, target, vocab_start_index, tp_group, inference_only)


class _Shared(torch.autograd.Function):
    """Backward divides what the operator has summed over the ranks, so that shares add up to it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None


def _replacements() -> Iterable[Replacement]:
    from skyrl.backends.skyrl_train.distributed.megatron import model_utils

    yield model_utils, "FusedLinearChunkedDistributedLogprob", FusedLinearChunkedDistributedLogprob


_patch = Patch("skyrl", ("0.3.",), _replacements)
apply, undo = _patch.apply, _patch.undo
