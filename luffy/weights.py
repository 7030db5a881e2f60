"""The policy's tensors by their Hugging Face names: to load into, to train, to give away."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luffy import lora
from luffy.shards import full

if TYPE_CHECKING:
    from luffy.model import Policy


def weights_of(policy: "Policy") -> dict[str, Tensor]:
    """Name -> parameter or buffer of the model itself, sharded where FSDP2 shards; what is tied to another and what
    LoRA adds are left out.

    Asked of the root, whose hooks put gathered parameters back into their shards first.
    """
    tied = set(policy.lm.all_tied_weights_keys)
    everything = policy.state_dict(keep_vars=True).items()
    names = {name.removeprefix("lm."): tensor for name, tensor in everything if name.startswith("lm.")}
    plain = {name.replace(lora.BASE, "."): tensor for name, tensor in names.items() if not lora.is_adapter(name)}
    return {name: tensor for name, tensor in plain.items() if name not in tied}


def everything_of(network: "Policy") -> dict[str, Tensor]:
    """Name -> parameter or buffer of a network beside the policy: `weights_of` it, and what it has beyond a model."""
    weights = weights_of(network)
    others = network.state_dict(keep_vars=True).items()
    return weights | {name: tensor for name, tensor in others if not name.startswith("lm.")}


def trained_of(policy: "Policy") -> dict[str, Tensor]:
    """Name -> what the optimizer has a state of: LoRA's adapters if there are any, else every weight."""
    weights = weights_of(policy)  # first, for its hooks
    return lora.adapters_of(policy.lm) or weights


def model_weights(policy: "Policy", dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the model as others load it, in layer order, adapters merged; shards where FSDP2 shards. In
    `dtype`, or else as the weights are held: float32 masters, or the compute type under LoRA. Collective."""
    weights = weights_of(policy)
    layers = {f"{name}.weight": layer for name, layer in lora.adapted(policy.lm)}
    for name, weight in weights.items():
        tensor = lora.merged(layers[name]) if name in layers else weight.detach()
        yield name, tensor.to(dtype or weight.dtype)


def described(policy: "Policy", dtype: torch.dtype) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """(name, type, shape) of what `hf_weights` gives, without gathering anything."""
    return [(name, dtype, tuple(weight.shape)) for name, weight in weights_of(policy).items()]


def hf_weights(policy: "Policy", dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """`model_weights`, each gathered whole after the conversion."""
    for name, tensor in model_weights(policy, dtype):
        yield name, full(tensor)
