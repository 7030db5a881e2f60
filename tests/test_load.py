"""Loading: bitwise what transformers loads, from slices, and no rank ever holds a whole model."""

import ctypes
import gc
import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from luffy.config import ModelConfig
from luffy.errors import UserError
from luffy.load import empty_lm, load_weights
from luffy.model import Policy, shard
from luffy.shards import full
from luffy.weights import weights_of

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
}


def save_model(folder: Path, family: str = "llama", *, dtype=torch.float32, max_shard_size="1GB", **options) -> Path:
    torch.manual_seed(1)
    lm = AutoModelForCausalLM.from_config((FAMILIES | {"moe": Qwen3MoeConfig})[family](**SMALL | options))
    lm.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def mesh():
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))


def loaded(folder: Path | str, *, sharded: bool = True, config: ModelConfig | None = None) -> Policy:
    policy = Policy(empty_lm(str(folder), config or ModelConfig()), 1.0)
    if sharded:
        policy = shard(policy, mesh(), torch.float32)
    load_weights(policy, str(folder), CPU)
    return policy


def reference(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_same_weights(policy: Policy, lm) -> None:
    ours, theirs = weights_of(policy), lm.state_dict()
    assert set(ours) | set(lm.all_tied_weights_keys) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(full(tensor.detach()), theirs[name]), name
    for (name, a), (_, b) in zip(policy.lm.named_buffers(), lm.named_buffers(), strict=True):
        assert not a.is_meta, name
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tied", "shards"), [(True, "1GB"), (False, "6KB")])
@pytest.mark.parametrize("family", FAMILIES)
def test_bitwise_what_transformers_loads(family, tied, shards, dtype, tmp_path):
    folder = save_model(tmp_path, family, tie_word_embeddings=tied, dtype=dtype, max_shard_size=shards)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shards == "6KB")
    theirs = reference(folder)
    for sharded in (False, True):
        assert_same_weights(loaded(folder, sharded=sharded), theirs)
    ours = loaded(folder, sharded=False).lm
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    ours.set_attn_implementation("eager")
    theirs.set_attn_implementation("eager")
    ids = torch.arange(3, 40)[None]
    assert torch.equal(ours.model(ids).last_hidden_state, theirs.model(ids).last_hidden_state)


def test_nothing_but_buffers_exists_before_the_weights_are_loaded(tmp_path):
    config = ModelConfig(gradient_checkpointing=True)
    lm = empty_lm(str(save_model(tmp_path, "gemma3")), config)
    assert all(p.is_meta for p in lm.parameters())
    assert list(lm.buffers())
    assert not any(b.is_meta for b in lm.buffers())
    assert lm.config._attn_implementation == "luffy_packed"
    assert lm.is_gradient_checkpointing
    assert lm.config.dtype == torch.float32
    plain = torch.nn.Linear(2, 2)
    assert not plain.weight.is_meta  # the hook is gone


def test_generation_settings_of_the_folder_are_kept(tmp_path):
    folder = save_model(tmp_path)
    described = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(described | {"eos_token_id": [2, 5]}))
    assert empty_lm(str(folder), ModelConfig()).generation_config.eos_token_id == [2, 5]


def edit(folder: Path, change) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight missing from the files"),
        (lambda t: t.update({"model.extra": torch.zeros(2)}), "the files hold model.extra that the model does not"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(7)}), r"model.norm.weight must have shape \(24,\), got"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        loaded(edit(save_model(tmp_path), change))


def test_a_file_that_was_cut_off_is_one_sentence(tmp_path):
    file = save_model(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    for size in (4, 100, len(whole) - 4):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match="model.safetensors"):
            loaded(tmp_path)
    file.write_bytes(b"\xff" * 1000)
    with pytest.raises(UserError, match="model.safetensors"):
        loaded(tmp_path)


def test_a_folder_without_a_model_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="model "):
        loaded(tmp_path)
    folder = save_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model "):
        loaded(folder)


def test_quantised_weights_are_refused(tmp_path):
    folder = save_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    with pytest.raises(UserError, match="quantised"):
        loaded(folder)


def test_a_tied_head_that_is_stored_too_and_old_buffers_are_no_surprise(tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    folder = edit(save_model(tmp_path, tie_word_embeddings=True), change)
    assert_same_weights(loaded(folder), reference(folder))


def test_another_layout_of_the_weights_beside_them_is_not_read(tmp_path):
    folder = save_model(tmp_path, max_shard_size="6KB")
    save_file({"model.norm.weight": torch.full((24,), 9.0)}, folder / "consolidated.safetensors")
    assert_same_weights(loaded(folder), reference(folder))


def test_experts_that_transformers_fuses_at_load_come_out_right(tmp_path, capsys):
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    folder = save_model(tmp_path, "moe", **options)
    assert_same_weights(loaded(folder), reference(folder))
    assert "every rank loads it whole" in " ".join(capsys.readouterr().err.split())
    whole = load_file(folder / "model.safetensors")
    del whole["model.layers.0.mlp.experts.3.up_proj.weight"]
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="experts"):
        loaded(folder)


def test_a_hub_id_is_found_in_the_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    repo = tmp_path / "models--someone--tiny"
    save_model(repo / "snapshots" / "abc", max_shard_size="6KB")
    make_tokenizer().save_pretrained(repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same_weights(loaded("someone/tiny"), reference(repo / "snapshots" / "abc"))


def test_two_ranks_hold_their_halves_and_never_a_whole_model(tmp_path):
    save_model(tmp_path / "tied", "gemma3", tie_word_embeddings=True, dtype=torch.bfloat16)
    save_model(tmp_path / "moe", "moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    save_model(tmp_path / "broken")
    shutil.copytree(tmp_path / "broken", tmp_path / "short")
    edit(tmp_path / "short", lambda tensors: tensors.pop("model.norm.weight"))
    big = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 8}
    save_model(tmp_path / "big", max_shard_size="50MB", **big, head_dim=64, num_key_value_heads=8)
    ranks.run(2, halves, tmp_path)


def halves(rank: int, world: int, folder: Path) -> None:
    for name in ("tied", "moe"):
        policy = loaded(folder / name)
        assert_same_weights(policy, reference(folder / name))
        parameters = {id(p) for p in policy.parameters()}
        assert all(isinstance(p, DTensor) for p in policy.parameters())
        assert parameters == {id(p) for p in weights_of(policy).values()}  # one object for a tied head
    with pytest.raises(UserError, match="model.norm.weight missing"):
        loaded(folder / "short")

    whole = sum(file.stat().st_size for file in (folder / "big").glob("*.safetensors"))
    with PeakMemory() as ours:
        policy = loaded(folder / "big")
    assert all(p.to_local().numel() == p.numel() // 2 for p in policy.parameters() if p.shape[0] % 2 == 0)
    del policy
    with PeakMemory() as everything:
        loaded(folder / "big", sharded=False)
    assert ours.bytes < 0.65 * whole, (ours.bytes / whole, everything.bytes / whole)
    assert everything.bytes > 0.95 * whole, everything.bytes / whole  # or the measure sees nothing


class PeakMemory:
    """Largest growth of this process's own memory (mapped files not counted) inside the block, sampled."""

    def __enter__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there to be used again unseen
        self._start, self.bytes, self._done = anonymous(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _watch(self):
        while not self._done.is_set():
            self.bytes = max(self.bytes, anonymous() - self._start)
            time.sleep(0.001)


def anonymous() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
