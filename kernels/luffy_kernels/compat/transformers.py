"""Models of transformers: the loss of `model(..., labels=...)` without logits, and log-probs of given tokens.

    from luffy_kernels.compat.transformers import patch, token_logprobs
    patch(model)                                 # model(input_ids, labels=labels).loss, and .logits is None
    token_logprobs(model, input_ids).logp        # [B, T - 1], differentiable; needs no patch

Calls without labels, such as `generate`'s, go where they went. What a family does to its logits is read from its config
(`head_options`), and `patch` compares that with the model's own logits on a few tokens before it changes a thing.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

from ..cross_entropy import linear_cross_entropy
from ..logprobs import LogProbs, linear_logprobs

PROBE = 4
"""Tokens that a model is compared on."""


def head_options(config: Any) -> dict[str, Any]:
    """softcap and logit_scale of a model family, from its (text) config: Gemma 2 and 3 cap their logits, Cohere,
    Granite, Falcon-H1 and others scale them."""
    scale = next(
        (
            value
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(config, name, None))
        ),
        1.0,
    )
    if scaling := getattr(config, "logits_scaling", None):
        scale = scale * scaling if getattr(config, "model_type", "") == "hyperclovax" else scale / scaling
    return {"softcap": getattr(config, "final_logit_softcapping", None), "logit_scale": scale}


def patch(model: nn.Module, *, check: bool = True) -> nn.Module:
    """Compute the loss of `model(..., labels=...)` from hidden states, in place; returns the model. Twice is once.

    check: compare logits on a few tokens first; leave it out where the model cannot run yet (meta tensors, shards).

    Raises:
        ValueError: the model has no output embedding, one that is no plain nn.Linear (quantised, with an adapter), or
            logits that are something else than its head and config say; the model is left as it is.
    """
    if hasattr(model, "_luffy_original"):
        return model
    head_of(model)
    if check:
        compare(model)
    own = model.__dict__.get("forward")
    original = model.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None or _wants_router_loss(self, kwargs):
            return original(*args, **kwargs | ({} if labels is None else {"labels": labels}))
        return _with_loss(self, args, kwargs, labels)

    model._luffy_original = own  # type: ignore[assignment]
    model.forward = types.MethodType(forward, model)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give the model its own forward back; harmless where it is not patched."""
    if hasattr(model, "_luffy_original"):
        own = model.__dict__.pop("_luffy_original")
        del model.forward
        if own is not None:
            model.forward = own
    return model


def token_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    ignore: Tensor | None = None,
    **kwargs: Any,
) -> LogProbs:
    """Log-prob (nats) of each token but the first given those before it, [B, T - 1], differentiable, without logits.

    input_ids: [B, T] int64. ignore: [B, T] bool, tokens that get 0 and no gradient. kwargs: of the model
    (attention_mask, position_ids, ...).

    Raises:
        ValueError: as `patch`, but for the comparison.
    """
    head = head_of(model)
    hidden = backbone_of(model)(input_ids=input_ids, **kwargs).last_hidden_state[:, :-1]
    targets = input_ids if ignore is None else input_ids.masked_fill(ignore, -100)
    return linear_logprobs(
        hidden,
        head.weight,
        targets[:, 1:].contiguous(),
        bias=head.bias,
        temperature=temperature,
        return_entropy=return_entropy,
        **head_options(_text_config(model)),
    )


def head_of(model: Any) -> nn.Linear:
    """Raises ValueError where there is none that is a matrix alone, by its name and with the reason."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ValueError(
            f"luffy_kernels: {type(model).__name__} has no output embedding, and so no logits to do without"
        )
    if type(head) is nn.Linear:
        return head
    name = next((name for name, module in model.named_modules() if module is head), "its output embedding")
    kind = f"{type(head).__module__}.{type(head).__name__}"
    why = "an adapter, whose share of the logits would be lost: merge it" if hasattr(head, "base_layer") else (
        "quantised, or computes something else than hidden W^T + b: load it in full precision"
    )  # fmt: skip
    raise ValueError(f"luffy_kernels: {name} of {type(model).__name__} must be a plain nn.Linear, and {kind} is {why}")


def compare(model: Any) -> None:
    """Raises ValueError where logits are not those of the head and the config's scale and cap."""
    head, options = head_of(model), head_options(_text_config(model))
    ids = torch.arange(1, 1 + PROBE, device=head.weight.device)[None] % head.weight.shape[0]
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            theirs = model(input_ids=ids).logits.double()
            hidden = backbone_of(model)(input_ids=ids).last_hidden_state
            ours = head(hidden).double() * options["logit_scale"]
    finally:
        model.train(mode)
    if (cap := options["softcap"]) is not None:
        ours = cap * torch.tanh(ours / cap)
    bound = 0.05 if head.weight.dtype in (torch.bfloat16, torch.float16) else 1e-3
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=bound, atol=bound):
        apart = "shape" if theirs.shape != ours.shape else f"up to {(theirs - ours).abs().max():.3g}"
        raise ValueError(
            f"luffy_kernels: logits of {type(model).__name__} differ ({apart}) from its head's with {options}: it does "
            f"something to them that this package does not know"
        )


def _with_loss(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], labels: Tensor) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    items, ignore = kwargs.pop("num_items_in_batch", None), kwargs.pop("ignore_index", -100)
    shifted = kwargs.pop("shift_labels", None)
    kwargs.pop("logits_to_keep", None)
    as_tuple = kwargs.pop("return_dict", True) is False
    head, found = head_of(model), backbone_of(model)(*args, **kwargs)
    hidden = found.last_hidden_state
    targets = shifted
    if targets is None:
        hidden, targets = hidden[:, :-1], labels[:, 1:]
    loss = linear_cross_entropy(
        hidden,
        head.weight,
        targets.to(hidden.device).contiguous(),
        bias=head.bias,
        normalizer=items,
        ignore_index=ignore,
        **head_options(_text_config(model)),
    )
    made = CausalLMOutputWithPast(
        loss=loss,  # type: ignore[arg-type]
        past_key_values=getattr(found, "past_key_values", None),
        hidden_states=getattr(found, "hidden_states", None),
        attentions=getattr(found, "attentions", None),
    )
    return made.to_tuple() if as_tuple else made


def _wants_router_loss(model: Any, kwargs: dict[str, Any]) -> bool:
    """Of a mixture of experts, which its own forward adds."""
    return bool(kwargs.get("output_router_logits") or getattr(_text_config(model), "output_router_logits", False))


def backbone_of(model: Any) -> Any:
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()
