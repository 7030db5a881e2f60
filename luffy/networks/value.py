"""The value model of PPO: V of every prefix of an answer, by the policy's architecture with one output in place of
the vocabulary's.

    loss = 1/2 mean over tokens of (V(prefix before the token) - return)^2

It begins with the model's weights and a head of zeros, so that V = 0 at first (ours: published heads are random). A
step's V, which advantages are made of, are those before it learns from the step.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luffy.config import Config
from luffy.distributed import World
from luffy.model import Policy
from luffy.networks.base import Taught
from luffy.packing import MicroBatch


class ValueModel(Policy):
    """`model(micro)` -> [N] float32."""

    def __init__(self, lm: PreTrainedModel, temperature: float, offload_activations: bool = False) -> None:
        super().__init__(without_head(lm), temperature, offload_activations)
        self.head = nn.Linear(lm.config.hidden_size, 1, bias=False, device="meta")

    def loss(self, hidden: Tensor, micro: MicroBatch, **loss: Any) -> Tensor:
        return hidden.float() @ self.head.weight.float()[0]


class Value(Taught):
    name: ClassVar = "value"
    kind: ClassVar = ValueModel
    model: ValueModel

    def __init__(self, config: Config, path: str, world: World) -> None:
        super().__init__(config, path, world)
        with torch.no_grad():
            self.model.head.weight.zero_()

    @property
    def lr(self) -> float:
        return self.options.value_lr

    def learn(self, micros: list[MicroBatch], update: int, total: int) -> dict[str, float]:
        """In `value_updates` updates, of as many micro-batches each."""
        size = -(-len(micros) // self.options.value_updates)
        found: dict[str, float] = {}
        for at in range(0, len(micros), size):
            found = self._update(micros[at : at + size], update, total)
        return found

    def _update(self, micros: list[MicroBatch], update: int, total: int) -> dict[str, float]:
        [tokens] = self.world.sum([float(sum(micro.num_targets for micro in micros))])
        loss = 0.0
        for micro in micros:
            part = (self.model(micro) - micro.returns).square().sum() / (2 * max(tokens, 1.0))
            part.backward()
            loss += part.item()
        return self.step("critic/vf_loss", loss, update, total)


def without_head(lm: PreTrainedModel) -> PreTrainedModel:
    """The same LM, whose hidden states nothing turns into logits; the files may hold a head all the same."""
    [name] = [name for name, module in lm.named_modules() if module is lm.get_output_embeddings()]
    lm.set_submodule(name, nn.Identity())
    lm.config.tie_word_embeddings = False
    lm.all_tied_weights_keys = {}
    lm._keys_to_ignore_on_load_unexpected = {*(lm._keys_to_ignore_on_load_unexpected or ()), rf"^{name}\."}
    return lm
