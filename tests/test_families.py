"""Names and values of the weights that engines are given, for the families that people train: as their checkpoints have
them, heads tied or not, and vLLM computes with them what the trainer does."""

import pytest
import torch
from safetensors.torch import load_file
from test_weight_sync import SEQUENCES, gap
from tiny import SIZES, make_policy, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from luffy.config import RolloutConfig
from luffy.rollout.vllm_engine import VllmEngine
from luffy.weights import described, hf_weights

FAMILIES = {
    "qwen2": {"tie_word_embeddings": False},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 32},
    "llama": {"tie_word_embeddings": False},
    "gemma2": {"tie_word_embeddings": True, "head_dim": 32, "query_pre_attn_scalar": 32},
    "gemma3_text": {"tie_word_embeddings": True, "head_dim": 32, "query_pre_attn_scalar": 32},
}


def make(name: str, folder) -> str:
    torch.manual_seed(1)
    tokenizer = make_tokenizer()
    config = AutoConfig.for_model(name.removesuffix("-tied"), vocab_size=len(tokenizer), **SIZES | FAMILIES[name])
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_have_the_names_of_the_familys_checkpoints(name, tmp_path):
    path = make(name, tmp_path / name)
    stored = load_file(tmp_path / name / "model.safetensors")
    policy = make_policy(path)
    sent = dict(hf_weights(policy, torch.float32))
    assert set(sent) == set(stored)
    assert ("lm_head.weight" in sent) == (not FAMILIES[name]["tie_word_embeddings"])
    for key, tensor in stored.items():
        assert torch.equal(sent[key], tensor.float()), key
    told = described(policy, torch.float32)
    assert told == [(key, torch.float32, tuple(tensor.shape)) for key, tensor in sent.items()]
    layers = [key.split(".layers.")[1].split(".")[0] for key in sent if ".layers." in key]
    assert layers == sorted(layers)  # in layer order


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma3_text"])
def test_vllm_computes_with_them_what_the_trainer_does(name, tmp_path):
    path = make(name, tmp_path / name)
    policy = make_policy(path)
    config = RolloutConfig(kv_cache_gib=0.25)
    with VllmEngine(path, config, dtype="float32", eos_token_id=2, max_model_len=256) as engine:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.3).add_(0.01 * torch.randn_like(parameter))
        assert gap(policy, engine) > 0.02
        engine.sync(policy, torch.float32, 1)
        assert gap(policy, engine) < 2e-3
    assert SEQUENCES
