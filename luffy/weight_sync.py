"""Trainer -> vLLM: every weight, by its Hugging Face name, in place.

vLLM fuses and shards what it is given. The prefix cache is emptied, for its entries belong to the old weights.
"""

import torch

from luffy.model import Policy
from luffy.rollout.vllm_engine import VllmEngine
from luffy.weights import hf_weights


def sync_weights(policy: Policy, engine: VllmEngine, dtype: torch.dtype) -> int:
    """Load the policy's current weights into the engine; returns how many tensors were sent."""
    sent = 0

    def stream():
        nonlocal sent
        for name, tensor in hf_weights(policy, dtype):
            sent += 1
            yield name, tensor

    engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream()})
    engine.llm.collective_rpc(_repack_tied_head)
    engine.llm.reset_prefix_cache()
    return sent


def _repack_tied_head(worker) -> None:
    """Make a tied head see the new embedding.

    On CPU vLLM 0.32 computes logits from a packed copy of the head's weight. A reload processes the embedding alone,
    so the copy would stay that of the old weights, silently. Drop this once a reload repacks tied heads.
    """
    model = worker.model_runner.get_model()
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)
