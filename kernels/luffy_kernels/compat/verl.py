"""verl's fused heads by this package's operator.

    from luffy_kernels.compat import verl
    verl.apply()         # both backends of `use_fused_kernels` ("triton", "torch")

or by import, with verl's signatures: `linear_cross_entropy`, `FusedLinearForPPO`.

verl's conventions: log-probs are positive ones (log p, not its negative), labels are shifted already, the entropy has a
gradient. `reduction` is of the log-probs; entropy is by token always.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn

from ..logprobs import linear_logprobs
from ._patch import Patch, Replacement, everywhere
from .megatron import Shared, first_entry, spread

REDUCTIONS = ("none", "sum", "mean")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy) in nats, fp32, [N] each or a scalar and [N]; differentiable in hidden and weight.

    Args:
        hidden: [..., H] float. labels: [...] integer, N in all; out come [N].
        weight: [V, H]; with a group this rank's part of a vocabulary that ranks hold in order, equal parts each. The
            gradient of hidden is then a rank's share, as verl's is: whoever gathered hidden adds the shares up.
        reduction: none, sum or mean, of the log-probs.

    Raises:
        ValueError: an unknown reduction, and what `linear_logprobs` raises.
    """
    if reduction.lower() not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction must be among {', '.join(REDUCTIONS)}, got {reduction!r}")
    group = spread(dist_process_group)
    if group is not None:
        hidden = Shared.apply(hidden, dist.get_world_size(group))
    found = linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1).long(),
        temperature=temperature,
        return_entropy=True,
        tp_group=group,
        vocab_start=first_entry(group, weight),
    )
    assert found.entropy is not None
    logp = found.logp if reduction.lower() == "none" else getattr(found.logp, reduction.lower())()
    return logp, found.entropy


class FusedLinearForPPO(nn.Module):
    """verl's torch backend, a module of the same calls."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        """Both are verl's, taken and not needed: the operator chooses for itself."""
        super().__init__()
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(log-probs in fp32, entropy in hidden's dtype) in nats, like input_ids, [T] or [B, T] integer; hidden_states
        [..., H], vocab_weights [V, H] float.

        Raises:
            ValueError: what `linear_logprobs` raises.
        """
        found = linear_logprobs(
            hidden_states, vocab_weights, input_ids.long(), temperature=temperature, return_entropy=True
        )
        assert found.entropy is not None
        return found.logp, found.entropy.to(hidden_states.dtype)


def _replacements() -> Iterable[Replacement]:
    from verl.utils.experimental import torch_functional
    from verl.utils.kernel import linear_cross_entropy as kernel

    yield from everywhere("verl", kernel, "linear_cross_entropy", linear_cross_entropy)
    yield from everywhere("verl", torch_functional, "FusedLinearForPPO", FusedLinearForPPO)


_patch = Patch("verl", ("0.9.",), _replacements)
apply, undo = _patch.apply, _patch.undo
