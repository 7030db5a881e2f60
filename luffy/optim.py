"""AdamW, its learning-rate schedule as a pure function of the update, and one guarded optimizer update."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from luffy.config import OptimConfig
from luffy.shards import full, local


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


@contextmanager
def parked(optimizer: Optimizer, host: str = "cpu") -> Iterator[None]:
    """Inside, the moments are in the host's memory, and the device has theirs for others: an engine's cache."""
    kept = []
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor) and value.dim():
                storage = local(value).untyped_storage()
                if storage.device.type != host:
                    kept.append((storage, storage.cpu() if storage.device.type != "cpu" else storage.clone()))
                    storage.resize_(0)
    try:
        yield
    finally:
        for storage, copy in kept:
            storage.resize_(copy.nbytes())
            storage.copy_(copy)


def learning_rate(config: OptimConfig, update: int, total: int) -> float:
    """Of the `update`-th update (from 0) of `total`."""
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (update - config.warmup_steps) / max(total - config.warmup_steps, 1)
    remaining = 1 - min(progress, 1.0)
    return config.lr * (remaining if config.schedule == "linear" else (1 - math.cos(math.pi * remaining)) / 2)


def step(optimizer: Optimizer, model: nn.Module, max_grad_norm: float, loss: float, lr: float) -> tuple[float, bool]:
    """Clip and update; returns (gradient norm before clipping, whether the update was made).

    A non-finite loss or gradient leaves weights and moments untouched.
    """
    norm = full(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)).item()
    good = math.isfinite(norm) and math.isfinite(loss)
    if good:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, good
