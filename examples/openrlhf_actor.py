"""OpenRLHF's actor without logits, in the order in which it asks: `python examples/openrlhf_actor.py`.

In a job: `openrlhf.apply()` in every worker before actors are made, and `without_logits(actor.model)` on each.
"""

import torch
from luffy_kernels.compat import openrlhf
from luffy_kernels.compat.transformers import unpatch
from transformers import AutoConfig, AutoModelForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
config = AutoConfig.for_model("qwen2", vocab_size=32_000, num_key_value_heads=4, **sizes)
model = AutoModelForCausalLM.from_config(config)
input_ids = torch.randint(0, config.vocab_size, (2, 128))

openrlhf.without_logits(model)
logits = model(input_ids).logits.to(torch.float32)  # an object with the shape of logits that nobody computes
print(f"{type(logits).__name__} {tuple(logits.shape)}, kept: hidden states {tuple(logits.hidden.shape)}")

log_probs = logits.log_probs(input_ids.roll(-1, dims=1))  # what `log_probs_from_logits` answers once applied
(-log_probs[:, :-1].mean() - 0.01 * logits.entropy.mean()).backward()
print(f"log-probs {tuple(log_probs.shape)}, mean {log_probs[:, :-1].mean():.4f}, entropy {logits.entropy.mean():.4f}")
unpatch(model)
