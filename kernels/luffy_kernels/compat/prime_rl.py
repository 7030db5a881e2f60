"""prime-rl's output linear with a temperature per token by this package's operator.

    from luffy_kernels.compat import prime_rl
    prime_rl.apply()       # before the model is set up, in every trainer process

`inject_prime_lm_head` then makes heads whose log-probs and entropy come from one sweep, with a gradient through both
(prime-rl's own has none through the entropy), for Gemma's capped logits too. What prime-rl may ask of its heads beside
(a sampling mask, further tokens) goes to its own forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..logprobs import linear_logprobs
from ._patch import Patch, Replacement


def output_linear(theirs: Any, output: Any) -> type:
    """In place of prime-rl's `FusedOutputLinear` or `GemmaFusedOutputLinear`. output: its `PrimeLmOutput`.

    Raises:
        AttributeError: its forward takes no labels and temperature.
    """
    taken = inspect.signature(theirs.forward).parameters
    if not {"hidden_states", "labels", "temperature"} <= taken.keys():
        raise AttributeError(f"{theirs.__name__}.forward takes {', '.join(taken)}")

    class OutputLinear(theirs):
        def forward(
            self, hidden_states: Tensor, labels: Tensor | None = None, temperature: Tensor | None = None, **more: Any
        ) -> Any:
            """hidden_states: [B, S, H]. labels: [B, S], shifted already. temperature: [B, S]. Log-probs and entropy
            come [B, S], nats, fp32."""
            if labels is None or temperature is None or any(value is not None for value in more.values()):
                return super().forward(hidden_states, labels=labels, temperature=temperature, **more)
            found = linear_logprobs(
                hidden_states,
                self.weight,
                labels.long(),
                temperature=temperature.to(torch.float32).view(labels.shape),
                softcap=getattr(self, "softcap", None),
                return_entropy=True,
            )
            return output(logprobs=found.logp, entropy=found.entropy)

    OutputLinear.__name__ = OutputLinear.__qualname__ = theirs.__name__
    return OutputLinear


def _replacements() -> Iterable[Replacement]:
    from prime_rl.trainer.models.layers import lm_head, lm_head_gemma

    for module, name in ((lm_head, "FusedOutputLinear"), (lm_head_gemma, "GemmaFusedOutputLinear")):
        yield module, name, output_linear(getattr(module, name), lm_head.PrimeLmOutput)


_patch = Patch("prime-rl", ("0.5.",), _replacements)
apply, undo = _patch.apply, _patch.undo
