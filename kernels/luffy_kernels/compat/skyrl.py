"""SkyRL's fused head of its Megatron workers by this package's operator.

    from luffy_kernels.compat import skyrl
    skyrl.apply()        # in every worker, before the model runs; trainer...fused_lm_head_logprob_backend = "torch"

or by import, with SkyRL's signature: `FusedLinearChunkedDistributedLogprob`. The gradient of hidden is a rank's share,
as SkyRL's is: whoever gathered hidden adds the shares up.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

from ._patch import Patch, Replacement
from .megatron import Shared, shard_logprobs, spread


class FusedLinearChunkedDistributedLogprob:
    """SkyRL's, of which its callers use `apply` alone."""

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

        hidden: [B, S, H] float, the same on all ranks. weight: [V / ranks, H] float, entries from vocab_start_index on.
        target: [B, S] integer, shifted already. vocab_end_index, chunk_size: taken and not needed.

        Raises:
            ValueError: what `luffy_kernels.linear_logprobs` raises.
        """
        if spread(tp_group) is not None:
            hidden = Shared.apply(hidden, dist.get_world_size(tp_group))
        return shard_logprobs(hidden, weight, target, vocab_start_index, tp_group, inference_only)


def _replacements() -> Iterable[Replacement]:
    from skyrl.backends.skyrl_train.distributed.megatron import model_utils

    yield model_utils, "FusedLinearChunkedDistributedLogprob", FusedLinearChunkedDistributedLogprob


_patch = Patch("skyrl", ("0.3.",), _replacements)
apply, undo = _patch.apply, _patch.undo
