"""TRL's fused head by this package's operator: GRPO, RLOO and KTO, whose trainers take log-probs and entropy from it.

    from luffy_kernels.compat import trl
    trl.apply()                       # before or after the trainer is made
    GRPOTrainer(...).train()

Every position of the loss goes through `linear_logprobs`: C++ on CPU, Triton on a GPU, statistics and gradients of the
head in fp32. Positions outside the loss are left out on all devices. SFT and DPO want more of a position (whether the
target is the most likely token, the mean logit), which this package does not compute: they keep TRL's own function.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..logprobs import linear_logprobs
from ._patch import Patch, Replacement

OURS = {"log_probs", "entropy"}
"""What `linear_logprobs` gives of what `add_fused_lm_head` can be asked for."""


def chunked_logprobs(theirs: Any) -> type:
    """In place of `trl.kernels.ChunkedLogProbFunction`, which is `theirs`."""

    class ChunkedLogProbs:
        @staticmethod
        def apply(
            hidden: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            targets: Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = tuple(OURS),
        ) -> tuple[Tensor | None, ...]:
            """(log-probs, entropy or None, None, None, None), [N] each; hidden [N, H], weight [V, H], targets [N]."""
            if not OURS.issuperset(outputs) or logit_scale <= 0:
                rest = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
                return theirs.apply(hidden, weight, bias, targets, *rest)
            if torch.is_autocast_enabled(hidden.device.type):
                dtype = torch.get_autocast_dtype(hidden.device.type)
                hidden, weight = hidden.to(dtype), weight.to(dtype)
            found = linear_logprobs(
                hidden,
                weight,
                targets,
                bias=bias,
                temperature=temperature,
                softcap=final_logit_softcapping,
                logit_scale=logit_scale,
                return_entropy="entropy" in outputs,
            )
            return found.logp, found.entropy, None, None, None

    return ChunkedLogProbs


def _replacements() -> Iterable[Replacement]:
    from trl.trainer import utils

    yield utils, "_ChunkedLogProbFunction", chunked_logprobs(utils._ChunkedLogProbFunction)
    yield utils, "_use_triton", lambda device: True  # there it says whether positions outside the loss are left out


_patch = Patch("trl", ("1.16.",), _replacements)
apply, undo = _patch.apply, _patch.undo
