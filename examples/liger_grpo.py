"""Liger's GRPO loss, by one import line: `python examples/liger_grpo.py`."""

import torch

# from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from luffy_kernels.compat.liger import LigerFusedLinearGRPOLoss

torch.manual_seed(0)
batch, length, width, vocabulary = 4, 128, 256, 32_000
hidden = torch.randn(batch, length, width, requires_grad=True)
weight = (torch.randn(vocabulary, width) * 0.05).requires_grad_()
tokens = torch.randint(0, vocabulary, (batch, length))
mask = torch.ones(batch, length)
mask[0, 100:] = 0
old = torch.full((batch, length), -10.4)

loss_of = LigerFusedLinearGRPOLoss(beta=0.04, loss_type="dapo", epsilon_high=0.28)
loss, (kl, clipped) = loss_of(
    hidden, weight, tokens, mask, torch.tensor([1.0, -1.0, 0.5, -0.5]), ref_per_token_logps=old, old_per_token_logps=old
)
loss.backward()
print(f"loss {loss.item():.5f}, KL {kl.item():.5f}, clipped {clipped.item():.1%}, |dW| {weight.grad.norm():.4f}")
