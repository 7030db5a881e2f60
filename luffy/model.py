"""The policy: a Hugging Face causal LM as an FSDP2 module whose forward ends in a loss, never in logits.

Body and loss run inside the root module's forward, so the head's weight is unsharded when `linear_policy_loss` reads
it. FSDP's own averaging is off: the loss is divided once, by a normaliser that the loop knows before the first
backward. Master weights and gradient reductions are float32, compute is `dtype`.
"""

from typing import Any

import torch
from luffy_kernels import linear_logprobs, linear_policy_loss
from luffy_kernels.compat.transformers import head_options
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from luffy import activations, flops
from luffy.errors import UserError
from luffy.packing import MicroBatch


class Policy(nn.Module):
    """`policy(micro, losses=..., normalizer=...)` -> PolicyLoss; `policy(micro)` -> log-probs [N] of the targets;
    `policy(micro, entropy=True)` -> those and entropies [N]."""

    def __init__(self, lm: PreTrainedModel, temperature: float, offload_activations: bool = False) -> None:
        super().__init__()
        self.lm = lm
        self.offload_activations = offload_activations
        self.shape = known_shape(lm.config)
        self.head_options: dict[str, Any] = head_options(lm.config) | {"temperature": temperature}

    @property
    def attention_weight(self) -> float:
        """What balances micro-batches, see `luffy.flops`; 0 where the model's shape is unknown: tokens alone count."""
        return 0.0 if self.shape is None else flops.attention_weight(self.shape)

    def forward(self, micro: MicroBatch, **loss: Any):
        body = self.lm.get_decoder()
        ids, positions = micro.token_ids[None], micro.positions[None]
        with activations.in_host_memory(self.offload_activations, ids.device):
            out = body(input_ids=ids, position_ids=positions, use_cache=False, layout=micro.layout)
        return self.loss(out.last_hidden_state[0].index_select(0, micro.source), micro, **loss)

    def loss(self, hidden: Tensor, micro: MicroBatch, **loss: Any):
        """hidden [N, H] of what predicts the targets -> what `forward` returns."""
        head = self.lm.get_output_embeddings()
        options = self.head_options | {"bias": getattr(head, "bias", None)}
        if not loss:
            # FSDP2 warns of a view
            return linear_logprobs(hidden, head.weight, micro.targets, **options).logp.clone()
        if loss.get("entropy"):
            return linear_logprobs(hidden, head.weight, micro.targets, return_entropy=True, **options)[:2]
        before = micro.compared_logp
        options |= {"old_logp": "current" if before is None else before}
        if micro.ref_logp is not None:
            options["ref_logp"] = micro.ref_logp
        options |= {"advantages": micro.advantages, "loss_id": micro.loss_id, "token_weight": micro.token_weight}
        return linear_policy_loss(hidden, head.weight, micro.targets, **options, **loss)


def known_shape(config: Any) -> flops.Shape | None:
    """None where `luffy.flops` cannot count the model's work."""
    try:
        return flops.shape_of(config)
    except UserError:
        return None


def shard(policy: Policy, mesh: DeviceMesh, dtype: torch.dtype, on_cpu: bool = False) -> Policy:
    """Apply FSDP2: every block is a unit; embedding, final norm and head (tied or not) stay together in the root's.
    on_cpu: shards, their gradients and the optimizer's state live in host memory."""
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # where nothing is split there is nothing to free by resharding, only copies to pay for
    reshard = mesh.size(-1) > 1
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": mixed, "reshard_after_forward": reshard}
    if on_cpu and mesh.device_type != "cpu":
        options["offload_policy"] = CPUOffloadPolicy()
    for block in policy.lm.get_decoder().layers:
        fully_shard(block, **options)
    fully_shard(policy, **options)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
    return policy
