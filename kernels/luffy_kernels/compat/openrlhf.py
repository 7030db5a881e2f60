"""OpenRLHF's actor without logits: its model gives `Logits` that are not computed, and what it asks of them is.

    from luffy_kernels.compat import openrlhf
    openrlhf.apply()                     # before actors are made, in every worker
    openrlhf.without_logits(actor.model) # the transformers model inside; undone by compat.transformers.unpatch

`Actor.forward` takes float32 logits, divides them by the temperature, and asks for log-probs of given tokens and for
the entropy, each by a function of its own. Both answer from hidden states here, in one sweep: labels are guessed to be
the next tokens, and where they are others the log-probs are computed again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..logprobs import LogProbs, linear_logprobs
from ._patch import Patch, Replacement
from .transformers import backbone_of, compare, head_of, head_options, kind_of, operands, put_on, refuse_patched


class Logits:
    """[..., V] logits that nobody has computed."""

    def __init__(self, hidden: Tensor, head: nn.Linear, options: dict[str, Any], targets: Tensor) -> None:
        """hidden: [..., H]. options: softcap, logit_scale. targets: [...] int64, the likely labels."""
        self.hidden, self.head, self.options, self.targets = hidden, head, options, targets
        self.temperature = 1.0
        self._known: LogProbs | None = None

    @property
    def shape(self) -> torch.Size:
        """[..., V]"""
        return torch.Size([*self.hidden.shape[:-1], self.head.weight.shape[0]])

    @property
    def dtype(self) -> torch.dtype:
        """What the actor would turn them into."""
        return torch.float32

    def to(self, dtype: torch.dtype) -> Logits:
        """Themselves: statistics are in float32, whatever the model's dtype.

        Raises:
            TypeError: another dtype is asked for.
        """
        if dtype != torch.float32:
            raise TypeError(f"luffy_kernels: logits that are not computed are float32, and cannot become {dtype}")
        return self

    def div_(self, temperature: float) -> Logits:
        """Themselves, at this temperature times the one before."""
        self.temperature, self._known = self.temperature * temperature, None
        return self

    def log_probs(self, labels: Tensor) -> Tensor:
        """[...] of the labels ([...] int64), nats, float32; differentiable."""
        if not torch.equal(labels, self.targets):
            self.targets, self._known = labels, None
        return self._swept.logp

    @property
    def entropy(self) -> Tensor:
        """[...], nats, float32; differentiable."""
        assert self._swept.entropy is not None
        return self._swept.entropy

    @property
    def _swept(self) -> LogProbs:
        wanted = torch.is_grad_enabled() and (self.hidden.requires_grad or self.head.weight.requires_grad)
        if self._known is None or (wanted and not self._known.logp.requires_grad):
            hidden, weight, bias = operands(self.hidden, self.head)
            self._known = linear_logprobs(
                hidden,
                weight,
                self.targets,
                bias=bias,
                temperature=self.temperature,
                return_entropy=True,
                **self.options,
            )
        return self._known


def without_logits(model: nn.Module, *, check: bool = True) -> nn.Module:
    """Make a transformers model give `Logits`, in place; returns the model. Its output takes part in nothing else:
    `generate` needs the model unpatched. check: compare logits on a few tokens first.

    Raises:
        ValueError: as `compat.transformers.patch`.
    """
    if kind_of(model) == "logits":
        return model
    refuse_patched(model)
    head_of(model)
    if check:
        compare(model, loss_too=False)

    def forward(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        found = backbone_of(self)(input_ids, *args, **kwargs)
        options = head_options(self.config.get_text_config())
        lazy: Any = Logits(found.last_hidden_state, head_of(self), options, input_ids.roll(-1, dims=1))
        return CausalLMOutputWithPast(logits=lazy)

    return put_on(model, "logits", forward)


def _log_probs(theirs: Any) -> Any:
    @functools.wraps(theirs)
    def log_probs_from_logits(logits: Any, labels: Tensor, temperature: float = 1.0) -> Tensor:
        if not isinstance(logits, Logits):
            return theirs(logits, labels, temperature)
        return (logits if temperature == 1.0 else logits.div_(temperature)).log_probs(labels)

    return log_probs_from_logits


def _entropy(theirs: Any) -> Any:
    @functools.wraps(theirs)
    def compute_entropy(logits: Any) -> Tensor:
        return logits.entropy if isinstance(logits, Logits) else theirs(logits)

    return compute_entropy


def _replacements() -> Iterable[Replacement]:
    from openrlhf.models import actor

    yield actor, "log_probs_from_logits", _log_probs(actor.log_probs_from_logits)
    yield actor, "compute_entropy", _entropy(actor.compute_entropy)


_patch = Patch("openrlhf", ("0.11.",), _replacements)
apply, undo = _patch.apply, _patch.undo
