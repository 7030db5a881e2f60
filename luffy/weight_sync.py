"""Trainer -> vLLM: every weight, by its Hugging Face name, in place.

vLLM fuses and shards what it is given. The prefix cache is emptied, for its entries belong to the old weights.
"""

import torch

from luffy.model import Policy, hf_weights
from luffy.rollout.vllm_engine import VllmEngine


def sync_weights(policy: Policy, engine: VllmEngine, dtype: torch.dtype) -> int:
    """Load the policy's current weights into the engine; returns how many tensors were sent."""
    sent = 0

    def stream():
        nonlocal sent
        for name, tensor in hf_weights(policy, dtype):
            sent += 1
            yield name, tensor

    engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream()})
    engine.llm.reset_prefix_cache()
    return sent
