"""What a checkpoint holds beside the weights of the policy, by the names that it has in the files."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from luffy.load import Shape
from luffy.networks import Network
from luffy.weights import everything_of


def optimizer_tensors(params: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """`NAME.step` [1], `NAME.exp_avg` and `NAME.exp_avg_sq` of every parameter that has been updated."""
    return {
        f"{name}.{key}": value if value.dim() else value.reshape(1)
        for name, param in params.items()
        for key, value in optimizer.state.get(param, {}).items()
    }


def network_tensors(networks: Sequence[Network]) -> dict[str, Tensor]:
    """`NETWORK.NAME` of every weight of those that are trained, and `optimizer_tensors` of them."""
    found: dict[str, Tensor] = {}
    for network in networks:
        if network.optimizer is not None:
            found |= (tensors := named(network)) | optimizer_tensors(tensors, network.optimizer)
    return found


def moments_to_fill(
    params: Mapping[str, Tensor], optimizer: Optimizer, saved: Mapping[str, Shape]
) -> dict[str, Tensor]:
    """Give the optimizer an empty state of what has one in the files, named as `optimizer_tensors` names it."""
    target: dict[str, Tensor] = {}
    for name, param in params.items():
        if f"{name}.step" not in saved:
            continue  # no update had been made when it was saved
        step = torch.zeros(1, dtype=torch.float32, device=param.device)
        state = {"step": step[0], "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
        target |= {f"{name}.step": step, **{f"{name}.{key}": state[key] for key in ("exp_avg", "exp_avg_sq")}}
        optimizer.state[param] = state
    return target


def named(network: Network) -> dict[str, Tensor]:
    return {f"{network.name}.{name}": tensor for name, tensor in everything_of(network.model).items()}
