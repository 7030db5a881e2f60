"""prime-rl's output linear, a temperature for each token: `python examples/prime_rl_head.py`.

In a job: `prime_rl.apply()` in every trainer process, before the model is set up. Here a class with the signature of
prime-rl's `FusedOutputLinear` stands in for it, so that the file runs without prime-rl.
"""

import torch
from luffy_kernels.compat.prime_rl import output_linear


class FusedOutputLinear(torch.nn.Linear):
    def __init__(self, in_features, out_features, chunk_size):
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size

    def forward(self, hidden_states, labels=None, temperature=None):
        raise NotImplementedError


torch.manual_seed(0)
head = output_linear(FusedOutputLinear, dict)(128, 32_000, chunk_size=2048)
hidden = torch.randn(2, 64, 128, requires_grad=True)
labels, temperature = torch.randint(0, 32_000, (2, 64)), torch.rand(2, 64) + 0.5
found = head(hidden, labels, temperature)
(-found["logprobs"].mean() - 0.01 * found["entropy"].mean()).backward()
print(f"log-probs {tuple(found['logprobs'].shape)}, mean {found['logprobs'].mean():.4f}, |dh| {hidden.grad.norm():.5f}")
