"""TRL's GRPO trainer with this package's head: `python examples/trl_grpo.py`. Needs trl."""

import tempfile

from datasets import Dataset
from luffy_kernels.compat import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

trl.apply()  # the one line; trl.undo() takes it back

# A tiny random model stands in for yours.
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "<end>", *letters])}, merges=[]))
core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
model = AutoModelForCausalLM.from_config(
    AutoConfig.for_model(
        "qwen2",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=1,
        pad_token_id=0,
    )
)


def share_of_letters(completions, **_):
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]


with tempfile.TemporaryDirectory() as folder:
    trainer = GRPOTrainer(
        model,
        reward_funcs=share_of_letters,
        args=GRPOConfig(
            folder, max_steps=3, per_device_train_batch_size=4, num_generations=4, max_completion_length=16,
            logging_steps=1, report_to="none", bf16=False, save_strategy="no", learning_rate=1e-3,
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"Say something about {n}." for n in range(16)]}),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
