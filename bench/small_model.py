"""A model small enough to train a hundred times on a laptop: its tokenizer, its shape, and the skills it begins with.

A byte-level tokenizer whose merges are learned from the study's own texts, except that every digit stays a token, and a
Llama with tied embeddings of a million parameters. `luffy train` itself teaches it: supervised, on problems that it is
to know before a study begins.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from luffy.prompts import CHATML

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = 128


def learn_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """From texts; the same for the same texts. Every digit is a token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = len(SPECIAL) + len(alphabet) + MERGES
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def make_model(folder: Path, texts: Iterable[str], *, seed: int, hidden: int = 128, blocks: int = 4) -> None:
    """Random weights and a tokenizer, as an ordinary model folder."""
    torch.manual_seed(seed)
    tokenizer = learn_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
