"""Sizes of a decoder-only transformer: all that predicting its memory and time needs. Imports neither torch nor
transformers, so that a plan costs no time.

    H hidden   L blocks   A = heads x head_dim, K = kv_heads x head_dim   I intermediate   V vocabulary
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from luffy.errors import UserError, first_line
from luffy.wording import nearest


@dataclass(frozen=True)
class Shape:
    """A model whose blocks are norm, attention, norm, gated MLP: Llama, Mistral, Qwen 2 and 3, SmolLM, Gemma."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    positions: int
    """Longest sequence that the model was made for, tokens."""
    qkv_bias: bool = False
    qk_norm: bool = False
    block_norms: int = 2
    """Norms of width H in a block: 2, or 4 where outputs are normed as well (Gemma 2 and 3)."""
    window: int | None = None
    """Attention window of some of its blocks, tokens."""
    attention_softcap: bool = False

    @property
    def attention(self) -> int:
        """A: width of all query heads."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """K: width of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def block_matrices(self) -> int:
        """Parameters of one block's seven products."""
        return 2 * self.hidden * (self.attention + self.key) + 3 * self.hidden * self.intermediate

    @property
    def block(self) -> int:
        """Parameters of one block."""
        bias = self.attention + 2 * self.key if self.qkv_bias else 0
        norms = self.block_norms * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return self.block_matrices + bias + norms

    def adapters(self, rank: int, targets: list[str] | None = None) -> tuple[int, int]:
        """(parameters of one block's LoRA adapters, sum of their ranks), on the named products or on all seven.

        Raises:
            UserError: a name is none of theirs.
        """
        hidden, attention, key = self.hidden, self.attention, self.key
        sides = {"q_proj": hidden + attention, "k_proj": hidden + key, "v_proj": hidden + key}
        sides |= {"o_proj": attention + hidden}
        sides |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + self.intermediate)
        if unknown := [name for name in targets or () if name not in sides]:
            raise UserError(f"plan: model.lora.targets: a plan does not know {unknown[0]}; known: {', '.join(sides)}")
        chosen = [both for name, both in sides.items() if targets is None or name in targets]
        return rank * sum(chosen), rank * len(chosen)

    @property
    def head(self) -> int:
        """Parameters of the head, which are the embedding's where `tied`."""
        return self.vocabulary * self.hidden

    @property
    def root(self) -> int:
        """Parameters outside the blocks: embedding, final norm, head."""
        return self.head * (1 if self.tied else 2) + self.hidden

    @cached_property
    def parameters(self) -> int:
        return self.layers * self.block + self.root


def shape_of(config: Any, name: str = "model") -> Shape:
    """The shape that a Hugging Face config (an object with `to_dict`, or its dict) describes.

    Raises:
        UserError: a size is missing, or the model is no dense decoder.
    """
    values: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    values = values.get("text_config") or values
    kind = str(values.get("model_type", ""))
    if any(values.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UserError(f"plan: {name} is a mixture of experts, which a plan does not know; take a dense model")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if lacking := [key for key in sizes if not isinstance(values.get(key), int) or values[key] < 1]:
        raise UserError(f"plan: the config of {name} must give {', '.join(lacking)} as a positive integer; it does not")
    hidden, layers, heads, intermediate, vocabulary = (values[key] for key in sizes)
    windows = values.get("layer_types")
    windowed = "sliding_attention" in windows if windows else values.get("use_sliding_window", True)
    gemma = kind.startswith(("gemma2", "gemma3"))
    return Shape(
        name=name,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or hidden // heads,
        intermediate=intermediate,
        vocabulary=vocabulary,
        tied=bool(values.get("tie_word_embeddings", kind.startswith("gemma"))),
        positions=values.get("max_position_embeddings") or 2**31,
        qkv_bias=kind == "qwen2" or bool(values.get("attention_bias")),
        qk_norm=kind in ("qwen3", "gemma3", "gemma3_text"),
        block_norms=4 if gemma else 2,
        window=values.get("sliding_window") if windowed else None,
        attention_softcap=bool(values.get("attn_logit_softcapping")),
    )


def _known(rows: str) -> dict[str, Shape]:
    shapes = {}
    for row in filter(None, map(str.strip, rows.splitlines())):
        name, *sizes, options = row.split()
        hidden, layers, heads, kv_heads, head_dim, intermediate, vocabulary, positions = map(int, sizes)
        flags = set(options.split(","))
        shapes[name] = Shape(
            name, hidden, layers, heads, kv_heads, head_dim, intermediate, vocabulary, "tied" in flags, positions,
            qkv_bias="bias" in flags, qk_norm="qknorm" in flags,
        )  # fmt: skip
    return shapes


# Of the published config.json of each base model.
# name                  H   L heads kv   D     I      V positions
KNOWN = _known("""
smollm2-135m          576  30   9   3   64  1536  49152   8192 tied
smollm2-360m          960  32  15   5   64  2560  49152   8192 tied
smollm2-1.7b         2048  24  32  32   64  8192  49152   8192 tied
qwen2.5-0.5b          896  24  14   2   64  4864 151936  32768 tied,bias
qwen2.5-1.5b         1536  28  12   2  128  8960 151936 131072 tied,bias
qwen2.5-3b           2048  36  16   2  128 11008 151936  32768 tied,bias
qwen2.5-7b           3584  28  28   4  128 18944 152064 131072 bias
qwen2.5-14b          5120  48  40   8  128 13824 152064 131072 bias
qwen2.5-32b          5120  64  40   8  128 27648 152064 131072 bias
qwen2.5-72b          8192  80  64   8  128 29568 152064 131072 bias
qwen2.5-math-1.5b    1536  28  12   2  128  8960 151936   4096 tied,bias
qwen2.5-math-7b      3584  28  28   4  128 18944 152064   4096 bias
qwen3-0.6b           1024  28  16   8  128  3072 151936  40960 tied,qknorm
qwen3-1.7b           2048  28  16   8  128  6144 151936  40960 tied,qknorm
qwen3-4b             2560  36  32   8  128  9728 151936  40960 tied,qknorm
qwen3-8b             4096  36  32   8  128 12288 151936  40960 qknorm
qwen3-14b            5120  40  40   8  128 17408 151936  40960 qknorm
qwen3-32b            5120  64  64   8  128 25600 151936  40960 qknorm
llama-3.2-1b         2048  16  32   8   64  8192 128256 131072 tied
llama-3.2-3b         3072  28  24   8  128  8192 128256 131072 tied
llama-3.1-8b         4096  32  32   8  128 14336 128256 131072 -
llama-3.1-70b        8192  80  64   8  128 28672 128256 131072 -
gemma-2b             2048  18   8   1  256 16384 256000   8192 tied
gemma-7b             3072  28  16  16  256 24576 256000   8192 tied
""")
# What a well-known name is followed by in names of models of the same shape.
SUFFIXES = ("-instruct", "-it", "-base", "-hf", "-chat")
# LUFFY's published starting point: Qwen2.5-Math-7B with longer positions.
KNOWN["qwen2.5-math-7b-16k-think"] = replace(KNOWN["qwen2.5-math-7b"], positions=16384)


def find_shape(model: str) -> Shape:
    """Of a local folder's config.json, a well-known model, or the config (nothing else) of a Hugging Face id.

    Raises:
        UserError: no such model, or its config cannot be had or read.
    """
    folder = Path(model).expanduser()
    if (file := folder / "config.json").is_file():
        return _from_file(file, folder.name)
    short = model.removeprefix("embedded:").rsplit("/", 1)[-1].lower()
    for suffix in ("", *SUFFIXES):
        if found := KNOWN.get(short.removesuffix(suffix) if suffix else short):
            return replace(found, name=model)
    if folder.is_dir():
        raise UserError(f"plan: the folder {model} has no config.json; name a model folder")
    if "/" not in model or model.startswith((".", "/", "~")):
        close = nearest(short, KNOWN)
        hint = f"did you mean {close}?" if close else f"known: {', '.join(KNOWN)}"
        raise UserError(f"plan: no folder and no well-known model is called {model!r}; {hint}")
    return _from_file(_download(model), model)


def _from_file(file: Path, name: str) -> Shape:
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"plan: the config.json of {name} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"plan: the config.json of {name} must hold an object, got {type(config).__name__}")
    return shape_of(config, name)


def _download(model: str) -> Path:
    """config.json alone, from the hub or its cache; code that comes with a model is not looked at."""
    import logging

    import huggingface_hub

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # one sentence below says it
    try:
        return Path(huggingface_hub.hf_hub_download(model, "config.json"))
    except (OSError, ValueError) as error:
        raise UserError(f"plan: the config of {model!r} cannot be had from the hub: {first_line(error)}") from None
