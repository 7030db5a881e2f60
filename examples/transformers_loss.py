"""A model's loss and the log-probs of its tokens without logits: `python examples/transformers_loss.py`."""

import torch
from luffy_kernels.compat.transformers import patch, token_logprobs, unpatch
from transformers import AutoConfig, AutoModelForCausalLM

torch.manual_seed(0)
config = AutoConfig.for_model(
    "qwen2",
    vocab_size=32_000,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
)
model = AutoModelForCausalLM.from_config(config)  # or AutoModelForCausalLM.from_pretrained(...)
input_ids = torch.randint(0, config.vocab_size, (2, 256))

plain = model(input_ids, labels=input_ids)
print(f"with logits {tuple(plain.logits.shape)}: loss {plain.loss:.6f}")

patch(model)  # compares itself with the model's logits first
found = model(input_ids, labels=input_ids)
found.loss.backward()
print(f"without:    loss {found.loss:.6f}, logits {found.logits}")

logp, entropy, *_ = token_logprobs(model, input_ids, temperature=0.7, return_entropy=True)
print(f"log-probs {tuple(logp.shape)}, mean {logp.mean():.4f}; entropy {entropy.mean():.4f} nats")
unpatch(model)
