"""TRL's fused head by this package's operator: GRPO, RLOO, SFT, DPO, KTO and whatever else asks `add_fused_lm_head`.

    from luffy_kernels.compat import trl
    trl.apply()                       # before or after the trainer is made
    GRPOTrainer(...).train()

Every position of the loss goes through `linear_logprobs`: C++ on CPU, Triton on a GPU, statistics and gradients of the
head in fp32. Positions outside the loss are left out on all devices.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..logprobs import linear_logprobs
from ._patch import Patch, Replacement

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


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
            outputs: tuple[str, ...] = OUTPUTS,
        ) -> tuple[Tensor | None, ...]:
            """(log-probs, entropy, log of the sum of squared probabilities, mean logit, whether the target is the most
            likely token), [N] each, in nats but for the last two, None for what is not among the outputs; hidden
            [N, H], weight [V, H], bias [V], targets [N].
            """
            softcap = final_logit_softcapping or None
            in_parts = hasattr(weight, "ds_id")  # ZeRO-3: theirs gathers it once more for the backward
            if in_parts or logit_scale <= 0 or ("mean_logits" in outputs and softcap is not None):
                rest = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
                return theirs.apply(hidden, weight, bias, targets, *rest)
            if torch.is_autocast_enabled(hidden.device.type):
                dtype = torch.get_autocast_dtype(hidden.device.type)
                hidden, weight = hidden.to(dtype), weight.to(dtype)
            head: dict[str, Any] = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale}
            targets = targets.long()
            found = linear_logprobs(hidden, weight, targets, temperature=temperature, return_entropy=True, **head)
            squares = mean = None
            with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
                if "log_sum_sq_probs" in outputs:  # sum_v exp(2 z_v) is that of half the temperature
                    twice = linear_logprobs(hidden, weight, targets, temperature=temperature / 2, **head)
                    squares = twice.lse - 2 * found.lse
                if "mean_logits" in outputs:  # a mean over the vocabulary of a product is one with the mean row
                    mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
                    mean = (mean if bias is None else mean + bias.float().mean()) * (logit_scale / temperature)
            entropy = found.entropy if "entropy" in outputs else None
            return found.logp, entropy, squares, mean, found.gap == 0 if "is_top1" in outputs else None

    return ChunkedLogProbs


def _replacements() -> Iterable[Replacement]:
    from trl.trainer import utils

    yield utils, "_ChunkedLogProbFunction", chunked_logprobs(utils._ChunkedLogProbFunction)
    yield utils, "_use_triton", lambda device: True  # there it says whether positions outside the loss are left out


_patch = Patch("trl", ("1.16.",), _replacements)
apply, undo = _patch.apply, _patch.undo
