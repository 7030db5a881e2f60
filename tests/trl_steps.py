"""Five steps of a TRL trainer on a tiny random model: `python trl_steps.py '{"ours": true, "out": FILE, ...}'`."""

import json
import sys
from pathlib import Path

import luffy_kernels
import torch
from datasets import Dataset
from luffy_kernels.compat import trl
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def letters(completions, **_) -> list[float]:
    """Share of letters in an answer."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in texts]


def main(asked: dict) -> None:
    torch.manual_seed(0)
    calls = 0

    def counted(*args, **options):
        nonlocal calls
        calls += 1
        return luffy_kernels.linear_logprobs(*args, **options)

    trl.linear_logprobs = counted
    if asked["ours"]:
        assert trl.apply()
    tokenizer = AutoTokenizer.from_pretrained(Path(asked["folder"]) / "tokenizer")
    name = asked.get("model", "qwen2")
    extra = {"head_dim": 16, "query_pre_attn_scalar": 16} if name == "gemma2" else {}
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer), tie_word_embeddings=False, **SIZES | extra)
    model = asked["folder"] + f"/model-{asked['ours']}"  # a reference model is loaded from there, too
    AutoModelForCausalLM.from_config(config).float().save_pretrained(model)
    common = {
        "output_dir": asked["folder"] + f"/out-{asked['ours']}",
        "max_steps": 5,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-2,
        "seed": 3,
        "gradient_checkpointing": asked.get("gradient_checkpointing", False),
        "torch_compile": asked.get("torch_compile", False),
        "save_strategy": "no",
    }
    peft = None
    if asked.get("lora"):
        from peft import LoraConfig

        peft = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    rows = [f"Say something about {n}." for n in range(40)]
    kind = asked.get("trainer", "grpo")
    if kind == "sft":
        data = Dataset.from_dict({"text": rows})
        trainer = SFTTrainer(model, args=SFTConfig(**common), train_dataset=data, processing_class=tokenizer)
    elif kind in ("dpo", "kto"):
        rows = [{"prompt": row, "chosen": "Yes, gladly.", "rejected": "No."} for row in rows]
        make, options = (DPOTrainer, DPOConfig) if kind == "dpo" else (KTOTrainer, KTOConfig)
        if kind == "kto":
            rows = [{"prompt": r["prompt"], "completion": r["chosen" if at % 2 else "rejected"], "label": at % 2 == 1}
                    for at, r in enumerate(rows)]  # fmt: skip
        more = {"use_weighting": True} if asked.get("use_weighting") else {}
        data = Dataset.from_list(rows)
        trainer = make(model, args=options(**common, **more), train_dataset=data, processing_class=tokenizer)
    else:
        sampled = {name: asked[name] for name in ("beta", "loss_type", "temperature") if name in asked}
        sampled |= {"num_generations": 4, "max_completion_length": 12}
        make, options = (RLOOTrainer, RLOOConfig) if kind == "rloo" else (GRPOTrainer, GRPOConfig)
        trainer = make(
            model,
            reward_funcs=letters,
            args=options(**common, **sampled),
            train_dataset=Dataset.from_dict({"prompt": rows}),
            processing_class=tokenizer,
            peft_config=peft,
        )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    steps[0]["calls"] = calls
    Path(asked["out"]).write_text(json.dumps(steps))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
