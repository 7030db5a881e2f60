"""Turn the GGUF file of a Llama model into an ordinary Hugging Face checkpoint: config, bf16 safetensors, tokenizer.

It reads the file with the `gguf` package alone: transformers' own reader needs `accelerate` as well, parses the file
three times over, and has changed its interface with every major release. Only SmolLM2's tokenizer is known here: a
byte-level BPE that splits numbers into single digits.
"""

from pathlib import Path
from typing import Any

from luffy.errors import UserError


def convert_llama(gguf_file: Path, out: Path) -> None:
    """Write the checkpoint of `gguf_file` into the folder `out`."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(gguf_file)
    field = {k: reader.fields[k].contents() for k in reader.fields}
    config = LlamaConfig(
        vocab_size=field["llama.vocab_size"],
        hidden_size=field["llama.embedding_length"],
        intermediate_size=field["llama.feed_forward_length"],
        num_hidden_layers=field["llama.block_count"],
        num_attention_heads=field["llama.attention.head_count"],
        num_key_value_heads=field["llama.attention.head_count_kv"],
        max_position_embeddings=field["llama.context_length"],
        rms_norm_eps=round(field["llama.attention.layer_norm_rms_epsilon"], 9),  # an fp32 field: 9.99999975e-06
        rope_parameters={"rope_type": "default", "rope_theta": field["llama.rope.freq_base"]},
        bos_token_id=field["tokenizer.ggml.bos_token_id"],
        eos_token_id=field["tokenizer.ggml.eos_token_id"],
        pad_token_id=field["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in list(reader.tensors):
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.split(".")[-2]
        if part in heads:  # GGUF interleaves the two halves of every rotary head
            value = value.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2)
        weights[_hf_name(tensor.name)] = value
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise UserError(f"{gguf_file.name} does not fit its config: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(out)
    _tokenizer(field).save_pretrained(out)


def _hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor of a Llama model."""
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    inner = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    if name in top:
        return top[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{inner[part]}.{kind}"


def _tokenizer(field: dict[str, Any]) -> Any:
    """The byte-level BPE of the file, with SmolLM2's single digits, special tokens and ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = field["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in field["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    kinds = field["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    named = {n: tokens[field[f"tokenizer.ggml.{k}_token_id"]] for n, k in _SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=field["tokenizer.chat_template"],
        model_max_length=field["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )


_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
