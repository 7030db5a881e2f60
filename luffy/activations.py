"""What the backward pass keeps of the body, and where: blocks recomputed in whole or in part, kept in host memory, MLPs
a piece of the tokens at a time. None of it changes a number beyond rounding."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from luffy.config import ModelConfig
from luffy.errors import UserError

# Products and attention are what is slow to compute again; everything between them is what takes the memory.
PRODUCTS = frozenset(f"aten::{name}" for name in ("mm", "addmm", "bmm", "linear"))
ATTENTION = frozenset(
    (
        *("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention"),
        *("aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention"),
        *("torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward", "flash_attn_3::_flash_attn_forward"),
    )
)


def apply(lm: PreTrainedModel, config: ModelConfig) -> None:
    """Set up what `config` asks for, in place. Raises UserError where the blocks have no MLP to cut."""
    if config.gradient_checkpointing:
        options: dict[str, Any] = {"use_reentrant": False}
        if config.gradient_checkpointing == "selective":
            keep = partial(_keep_products, config.lora.rank)
            options["context_fn"] = lambda: create_selective_checkpoint_contexts(keep)
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if config.mlp_tokens is not None:
        for block in lm.get_decoder().layers:
            if not hasattr(block, "mlp"):
                raise UserError(f"model.mlp_tokens: {type(block).__name__} has no `mlp` to cut; leave it null")
            block.mlp.forward = tiled(block.mlp.forward, config.mlp_tokens)


def _keep_products(rank: int | None, _: Any, op: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    """LoRA's own products are cheap, and their results as large as those of the layers beside them."""
    name = op.name()
    adapter = name in PRODUCTS and rank is not None and min(args[-1].shape) == rank
    kept = name in ATTENTION or (name in PRODUCTS and not adapter)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def tiled(forward: Callable[[Tensor], Tensor], tokens: int) -> Callable[[Tensor], Tensor]:
    """forward over [1, T, H], `tokens` of T at a time and computed again by the backward pass: what an MLP widens its
    input to exists for one piece at a time (arXiv 2506.13996, section 3.3)."""

    def call(x: Tensor) -> Tensor:
        pieces = x.split(tokens, dim=1)
        if len(pieces) == 1:
            return forward(x)
        if not torch.is_grad_enabled():
            return torch.cat([forward(piece) for piece in pieces], dim=1)
        return torch.cat([checkpoint(forward, piece, use_reentrant=False) for piece in pieces], dim=1)

    return call


def in_host_memory(wanted: bool, device: torch.device) -> AbstractContextManager[Any]:
    """Inside, what is saved for the backward pass waits in (pinned) host memory."""
    return torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda") if wanted else nullcontext()
