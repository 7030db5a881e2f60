"""The head as a module, for whoever shards parameters: FSDP gathers a module's weight when its `forward` runs.

    head = LinearHead.of(lm.lm_head)
    fully_shard(head, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False))
    out = head(linear_policy_loss, hidden, targets, advantages=..., losses=..., normalizer=...)

Reading `lm.lm_head.weight` outside a forward would find a shard. Two more things that FSDP2 does by default: it casts
every input to the parameters' dtype, advantages and old log-probs too (hence `cast_forward_inputs=False`, with hidden
in the dtype you want), and it averages gradients over ranks. Where the normaliser already is the global one, call
`set_gradient_divide_factor(1.0)`, and on gloo `set_force_sum_reduction_for_comms(True)`. A head tied to the embedding
cannot be sharded apart from it: leave both in the root module and call the operator inside the root's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

Result = TypeVar("Result")


class LinearHead(nn.Module):
    """A linear head that is asked for a result instead of logits."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> None:
        """weight: [V, H]. bias: [V]. softcap, logit_scale: as in the operators."""
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.softcap, self.logit_scale = softcap, logit_scale

    @classmethod
    def of(cls, linear: nn.Linear, **options: Any) -> LinearHead:
        """A head with the very parameters of this layer. options: softcap, logit_scale. Adapters of the layer (LoRA)
        would be ignored: merge them into the weight, or pass the composed weight to the operator.

        Raises:
            ValueError: the layer is not a plain nn.Linear.
        """
        if type(linear) is not nn.Linear:
            raise ValueError(f"LinearHead: linear must be a plain nn.Linear, got {type(linear).__name__}")
        assert isinstance(linear.weight, nn.Parameter)
        return cls(linear.weight, linear.bias, **options)

    def forward(self, op: Callable[..., Result], hidden: Tensor, targets: Tensor, **options: Any) -> Result:
        """op(hidden, weight, targets, bias=, softcap=, logit_scale=, **options), for any operator of this package.

        hidden: [..., H]. targets: [...] int64. options: the operator's, and win over the head's own.
        """
        own = {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}
        return op(hidden, self.weight, targets, **(own | options))
