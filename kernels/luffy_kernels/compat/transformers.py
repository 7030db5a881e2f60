"""Models of transformers: the loss of `model(..., labels=...)` without logits, and log-probs of given tokens.

    from luffy_kernels.compat.transformers import patch, token_logprobs
    patch(model)                                 # model(input_ids, labels=labels).loss, and .logits is None
    token_logprobs(model, input_ids).logp        # [B, T - 1], differentiable; needs no patch

Calls without labels, such as `generate`'s, go where they went. What a family does to its logits is read from its config
(`head_options`), and `patch` compares that with the model's own logits on a few tokens before it changes a thing.
"""

from __future__ import annotations

import functools
import inspect
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

    check: compare logits and a loss on a few tokens first; leave it out where the model cannot run yet (meta tensors,
    shards).

    Raises:
        ValueError: the model has no output embedding, one that is no plain matrix (quantised, with an adapter), or
            logits or a loss that are something else than its head and config say; the model is left as it is.
    """
    if kind_of(model) == "loss":
        return model
    refuse_patched(model)
    head_of(model)
    if check:
        compare(model)
    names = list(inspect.signature(type(model).forward).parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        labels = given.pop("labels", None)
        if labels is None or given.get("logits_to_keep") or _wants_router_loss(self, given):
            return own_forward(self)(*args, **kwargs)
        return _with_loss(self, given, labels)

    return put_on(model, "loss", forward)


def put_on(model: nn.Module, kind: str, forward: Any) -> nn.Module:
    """Give the model a class of the same name with this forward; so copies and replicas run it on themselves."""
    theirs = type(model)
    names = {name: getattr(theirs, name) for name in ("__module__", "__qualname__", "__doc__")}
    forward = functools.wraps(theirs.forward)(forward)
    model._luffy_forward = model.__dict__.pop("forward", None)
    model.__class__ = type(theirs.__name__, (theirs,), names | {"forward": forward, "_luffy": kind, "_theirs": theirs})
    return model


def kind_of(model: Any) -> str:
    """What the model is patched for; "" for nothing."""
    return getattr(type(model), "_luffy", "")


def refuse_patched(model: Any) -> None:
    """Raises:
    ValueError: the model is patched in another way already.
    """
    if kind := kind_of(model):
        raise ValueError(f"luffy_kernels: {type(model).__name__} is patched for its {kind}; unpatch it first")


def own_forward(model: Any) -> Any:
    """As it was before the patch: its class's, or one that was put on this very object."""
    return model._luffy_forward or functools.partial(type(model)._theirs.forward, model)


def unpatch(model: nn.Module) -> nn.Module:
    """Give the model its own class and forward back; harmless where it is not patched.

    Raises:
        ValueError: it was wrapped meanwhile (`fully_shard`), and its class is another's.
    """
    if not kind_of(model):
        return model
    if "_theirs" not in vars(type(model)):
        raise ValueError(f"luffy_kernels: {type(model).__name__} was wrapped after it was patched, and stays so")
    own = model.__dict__.pop("_luffy_forward")
    model.__class__ = type(model)._theirs  # type: ignore[attr-defined]
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
    """Log-prob (nats) of each token but the first given those before it, [B, T - 1] fp32, differentiable, without
    logits.

    input_ids: [B, T] integer. temperature: number, or tensor that broadcasts to [B, T - 1]. ignore: [B, T] bool, tokens
    that get 0 and no gradient. kwargs: of the model (attention_mask, position_ids, ...).

    Raises:
        ValueError: as `patch`, but for the comparison.
    """
    head = head_of(model)
    hidden = backbone_of(model)(input_ids=input_ids, **kwargs).last_hidden_state[:, :-1]
    targets = input_ids.long() if ignore is None else input_ids.long().masked_fill(ignore, -100)
    hidden, weight, bias = operands(hidden, head)
    return linear_logprobs(
        hidden,
        weight,
        targets[:, 1:].contiguous(),
        bias=bias,
        temperature=temperature,
        return_entropy=return_entropy,
        **head_options(_text_config(model)),
    )


def head_of(model: Any) -> nn.Linear:
    """The output embedding, a plain matrix.

    Raises:
        ValueError: there is none, or it is something else; by its name and with the reason.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ValueError(
            f"luffy_kernels: {type(model).__name__} has no output embedding, and so no logits to do without"
        )
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if plain and head.weight.is_floating_point():
        return head
    name = next((name for name, module in model.named_modules() if module is head), "its output embedding")
    kind = f"{type(head).__module__}.{type(head).__name__}"
    if hasattr(head, "modules_to_save"):
        why = "a copy that is trained beside the original: unwrap it"
    elif hasattr(head, "base_layer"):
        why = "an adapter, whose share of the logits would be lost: merge it"
    else:
        why = "quantised, or computes something else than hidden W^T + b: load it in full precision"
    raise ValueError(f"luffy_kernels: {name} of {type(model).__name__} must be a plain nn.Linear, and {kind} is {why}")


def operands(hidden: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden [..., H], weight [V, H] and bias [V] as the head would multiply them: whole, and in autocast's dtype.

    Raises:
        ValueError: DeepSpeed holds the weight in parts (ZeRO-3).
    """
    weight: Any = head.weight
    bias: Any = head.bias
    if hasattr(weight, "ds_id") and weight.ndim != 2:
        raise ValueError("luffy_kernels: the head's weight is in parts (ZeRO-3), and the operators need all of it")
    if hasattr(weight, "full_tensor"):  # FSDP2's shards; backward scatters the gradient
        weight = weight.full_tensor()
        bias = None if bias is None else bias.full_tensor()
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return hidden, weight, bias


def compare(model: Any, loss_too: bool = True) -> None:
    """Run the model on a few tokens, in evaluation mode and without gradients.

    Raises:
        ValueError: its logits are not those of the head and its options, or (with loss_too) its loss is another.
    """
    head, options = head_of(model), head_options(_text_config(model))
    ids = torch.arange(1, 1 + PROBE, device=head.weight.device)[None] % head.weight.shape[0]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            found = model(input_ids=ids, labels=ids, return_dict=True)
            theirs, loss = found.logits.double(), found.loss
            hidden = backbone_of(model)(input_ids=ids, return_dict=True).last_hidden_state
            ours = head(hidden).double() * options["logit_scale"]
            our_loss = _with_loss(model, {"input_ids": ids}, ids).loss
    finally:
        for module, training in modes:
            module.training = training
    if (cap := options["softcap"]) is not None:
        ours = cap * torch.tanh(ours / cap)
    bound = 0.05 if head.weight.dtype in (torch.bfloat16, torch.float16) else 1e-3
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=bound, atol=bound):
        apart = "shape" if theirs.shape != ours.shape else f"up to {(theirs - ours).abs().max():.3g}"
        raise ValueError(
            f"luffy_kernels: logits of {type(model).__name__} differ ({apart}) from its head's with {options}: it does "
            f"something to them that this package does not know"
        )
    comparable = loss_too and not _wants_router_loss(model, {})
    if comparable and (loss is None or abs(loss - our_loss) > bound * max(1, abs(loss))):
        raise ValueError(
            f"luffy_kernels: the loss of {type(model).__name__} is {loss}, the mean over next tokens is {our_loss}: "
            f"it shifts labels in another way, or has a loss_function of its own"
        )


def _with_loss(model: Any, given: dict[str, Any], labels: Tensor) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    given = dict(given)
    items, ignore = given.pop("num_items_in_batch", None), given.pop("ignore_index", -100)
    shifted = given.pop("shift_labels", None)
    given.pop("logits_to_keep", None)
    as_tuple = given.pop("return_dict", None) is False
    found = backbone_of(model)(**given, return_dict=True)
    hidden, weight, bias = operands(found.last_hidden_state, head_of(model))
    targets = shifted
    if targets is None:
        hidden, targets = hidden[:, :-1], labels[:, 1:]
    loss = linear_cross_entropy(
        hidden,
        weight,
        targets.to(hidden.device).long().contiguous(),
        bias=bias,
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
    """All of the model but its head, images and all."""
    return model.base_model


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()
