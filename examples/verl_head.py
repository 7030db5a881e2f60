"""verl's fused head by its signature: `python examples/verl_head.py`. In a verl job: `verl.apply()` in every worker."""

import torch
from luffy_kernels.compat.verl import FusedLinearForPPO, linear_cross_entropy

torch.manual_seed(0)
hidden = torch.randn(2, 64, 128, requires_grad=True)
weight = (torch.randn(32_000, 128) * 0.05).requires_grad_()
labels = torch.randint(0, 32_000, (2, 64))  # shifted already: labels[t] is the token after hidden[t]

log_probs, entropy = linear_cross_entropy(hidden, weight, labels, 0.7, "none")
(-log_probs.mean() - 0.01 * entropy.mean()).backward()
print(f"triton's place: log-probs {tuple(log_probs.shape)}, mean {log_probs.mean():.4f}, |dh| {hidden.grad.norm():.5f}")

log_probs, entropy = FusedLinearForPPO()(hidden, weight, labels, temperature=0.7)
print(f"torch's place:  log-probs {tuple(log_probs.shape)}, mean {log_probs.mean():.4f}, entropy {entropy.mean():.4f}")
