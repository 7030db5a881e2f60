"""A tiny random model of the default architecture with a real tokenizer, as an ordinary model folder."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import warm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from luffy import distributed
from luffy.config import MeshConfig, ModelConfig
from luffy.load import empty_lm, load_weights
from luffy.model import Policy, shard
from luffy.prompts import CHATML
from luffy.rollout.engine import Request, generate

ROOT = Path(__file__).resolve().parent.parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, no merges: every byte is a token, nothing is unknown."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_policy(path: str) -> Policy:
    """The trainer's, in float32, with the weights at `path`."""
    world = distributed.start(MeshConfig())
    policy = shard(Policy(empty_lm(path, ModelConfig()), 1.0), world.params, torch.float32)
    load_weights(policy, path, world.device)
    return policy


def make_model(folder: Path, seed: int = 0) -> Path:
    """Llama like SmolLM2 (tied head, grouped-query attention), a few hundred thousand parameters."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **SIZES)
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: Iterable[dict]) -> Path:
    """A file of rows, a line each."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sample(engine, prompts, counts, *, temperature: float, max_tokens: int, seeds) -> list:
    """Completions of each prompt."""
    asked = zip(prompts, counts, seeds, strict=True)
    return generate(engine, [Request(p, count, max_tokens, seed) for p, count, seed in asked], temperature)


def luffy(
    *args: str | Path, cwd: Path, timeout: int = 240, fresh: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a user would; caches go below `cwd`.

    fresh: of a new interpreter, where what it imports or how it ends is what the test is about, or where its set orders
    must differ from another's.
    """
    environment = os.environ | {"LUFFY_CACHE": str(cwd / "cache"), "COLUMNS": "120"} | env
    if not fresh and warm.serves(environment):
        return warm.luffy([*map(str, args)], cwd, environment, timeout)
    command = [sys.executable, "-m", "luffy", *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
