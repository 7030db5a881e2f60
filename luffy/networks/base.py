"""What a network beside the policy is."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from transformers import PreTrainedModel

from luffy import optim
from luffy.config import Config, LoraConfig
from luffy.distributed import World
from luffy.dtypes import dtype_of
from luffy.load import empty_lm, load_weights
from luffy.model import Policy, shard
from luffy.packing import MicroBatch


class Network:
    """Made, asked and taught by all ranks together."""

    name: ClassVar[str]
    kind: ClassVar[type[Policy]] = Policy
    optimizer: Optimizer | None = None
    """None: it is frozen, and no part of a checkpoint."""

    def __init__(self, config: Config, path: str, world: World) -> None:
        """
        Raises:
            UserError: as `empty_lm` and `load_weights`.
        """
        self.config, self.world = config, world
        self.options: Any = config.objective
        whole = config.model.model_copy(update={"lora": LoraConfig()})
        on_cpu = self.on_cpu
        self.model = shard(self.build(empty_lm(path, whole)), world.params, dtype_of(config.model.dtype), on_cpu)
        load_weights(self.model, path, world.device, weights_on=torch.device("cpu") if on_cpu else world.device)

    @property
    def on_cpu(self) -> bool:
        """Whether its shards wait in host memory for their use."""
        return self.config.optim.on_cpu

    def build(self, lm: PreTrainedModel) -> Policy:
        """The module, of an LM whose parameters are empty."""
        return self.kind(lm, self.config.rollout.temperature, self.config.model.offload_activations)

    def says(self, micro: MicroBatch) -> Tensor:
        """[N] float32: of every target of a micro-batch."""
        return self.model(micro)

    @property
    def learns_first(self) -> bool:
        """Whether it learns a step's rows before it is asked about them, and not after the policy has learned them."""
        return False

    def learn(self, micros: list[MicroBatch], update: int, total: int) -> dict[str, float]:
        """Learn from an update's micro-batches, the `update`-th (from 0) of `total`; returns metrics."""
        return {}

    def rest(self) -> None:
        """Let go of what a pass has gathered."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class Taught(Network):
    """One with an optimizer of its own, saved with a checkpoint."""

    optimizer: Optimizer

    def __init__(self, config: Config, path: str, world: World) -> None:
        super().__init__(config, path, world)
        self.optim = config.optim.model_copy(update={"lr": self.lr, "max_grad_norm": self.max_grad_norm})
        self.optimizer = optim.make_optimizer(self.model.train(), self.optim)

    @property
    def lr(self) -> float:
        """Learning rate at its highest; over the steps it goes as the policy's does."""
        raise NotImplementedError

    @property
    def max_grad_norm(self) -> float:
        """What its gradient is clipped to; the policy's by default."""
        return self.config.optim.max_grad_norm

    def step(self, name: str, loss: float, update: int, total: int) -> dict[str, float]:
        """The optimizer's, all gradients being there. name: of the metric of this rank's `loss`."""
        [loss] = self.world.sum([loss])
        lr = optim.learning_rate(self.optim, update, total)
        norm, _ = optim.step(self.optimizer, self.model, self.optim.max_grad_norm, loss, lr)
        self.rest()
        where = name.rpartition("/")[0]
        return {name: loss, f"{where}/grad_norm": norm, f"{where}/lr": lr}
