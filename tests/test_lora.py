"""LoRA: what is trained, what others see of it, and that it survives like everything else."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from test_load import save_model
from test_packing import GROUPS
from test_train import arguments, assert_same_state, records, without_times
from tiny import luffy, make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from luffy import checkpoint, distributed, lora, optim
from luffy.config import Config, LoraConfig, MeshConfig, ModelConfig
from luffy.dtypes import dtype_of
from luffy.errors import UserError
from luffy.load import empty_lm, load_weights
from luffy.model import Policy, shard
from luffy.packing import pack
from luffy.shards import fill
from luffy.weights import hf_weights, trained_of, weights_of

CPU = torch.device("cpu")
RANK, ALPHA = 3, 12.0


def adapted(folder: Path, dtype: str = "float32", world=None, **options) -> Policy:
    config = ModelConfig(name=str(folder), dtype=dtype, lora=LoraConfig(rank=RANK, alpha=ALPHA, **options))
    policy = Policy(empty_lm(str(folder), config), 1.0)
    if world is not None:
        policy = shard(policy, world.params, dtype_of(dtype))
    load_weights(policy.train(), str(folder), CPU)
    lora.initialise(policy.lm, seed=5)
    return policy


def plain(folder: Path) -> Policy:
    policy = Policy(empty_lm(str(folder), ModelConfig(dtype="float32")), 1.0)
    load_weights(policy.train(), str(folder), CPU)
    return policy


def stir(policy: Policy) -> None:
    """Adapters that say something: known numbers, the same whatever the ranks."""
    with torch.no_grad():
        for number, parameter in enumerate(lora.adapters_of(policy.lm).values()):
            generator = torch.Generator().manual_seed(number)
            fill(parameter, 0.2 * torch.randn(parameter.shape, generator=generator))


def logp(policy: Policy) -> torch.Tensor:
    [micro] = pack(GROUPS, lambda g: g.rows, 1000)
    return policy(micro)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), "qwen2")


def test_training_starts_from_the_model_itself(folder):
    policy = adapted(folder)
    torch.testing.assert_close(logp(policy), logp(plain(folder)), atol=1e-6, rtol=0)
    names = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in policy.named_parameters() if "lora_A" in name}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    a = next(p for name, p in lora.adapters_of(policy.lm).items() if "lora_A" in name)
    assert 0.8 < a.abs().max() * a.shape[1] ** 0.5 <= 1
    again = adapted(folder)
    for (name, one), other in zip(trained_of(policy).items(), trained_of(again).values(), strict=True):
        assert torch.equal(one, other), name


def test_it_computes_what_the_merged_model_computes_and_trains_the_adapters_alone(folder):
    policy = adapted(folder)
    stir(policy)
    logp(policy).sum().backward()

    merged = plain(folder)
    before = {name: tensor.clone() for name, tensor in weights_of(merged).items()}
    moved = dict(hf_weights(policy))
    assert moved.keys() == before.keys()
    with torch.no_grad():
        for name, tensor in weights_of(merged).items():
            tensor.copy_(moved[name])
    found = logp(merged)
    torch.testing.assert_close(logp(policy), found, atol=1e-5, rtol=1e-5)
    assert (found - logp(plain(folder))).abs().max() > 0.1
    changed = {name for name in before if not torch.equal(before[name], moved[name])}
    assert changed == {name for name in before if "_proj.weight" in name}  # biases, norms and the embedding stay

    found.sum().backward()  # the chain rule by hand: dB = s dW A^T, dA = s B^T dW
    layers = dict(lora.adapted(policy.lm))
    for name, layer in layers.items():
        dw = merged.lm.get_parameter(f"{name}.weight").grad
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(a.grad, ALPHA / RANK * b.T @ dw, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(b.grad, ALPHA / RANK * dw @ a.T, atol=1e-4, rtol=1e-4)
    assert len(layers) == 14
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is None) == ("lora_" not in name), name


def test_the_base_is_kept_in_the_compute_type(folder):
    policy = adapted(folder, "bfloat16", distributed.start(MeshConfig()))
    for name, parameter in policy.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
    assert all(not b.dtype.is_floating_point or b.dtype == torch.float32 for b in policy.buffers())
    optimizer = optim.make_optimizer(policy, Config().optim)
    logp(policy).sum().backward()
    norm, good = optim.step(optimizer, policy, 1.0, 0.0, 1e-2)
    assert good
    assert norm > 0
    assert len(optimizer.state) == 28
    assert {tensor.dtype for _, tensor in hf_weights(policy)} == {torch.bfloat16}


@pytest.mark.slow
def test_ranks_share_adapters_and_checkpoints(folder, tmp_path):
    ranks.run(2, two_ranks, folder, tmp_path)
    policy, found = adapted(folder), tmp_path / "two" / "step-000003"
    stir(policy)
    optimizer = optim.make_optimizer(policy, Config().optim)
    logp(policy).sum().backward()
    optim.step(optimizer, policy, 1.0, 0.0, 1e-2)
    after = {name: tensor.detach().clone() for name, tensor in trained_of(policy).items()}

    resumed = adapted(folder)
    fresh = optim.make_optimizer(resumed, Config().optim)
    checkpoint.load_adapters(found, resumed)
    checkpoint.load_optimizer(found, resumed, fresh)
    for name, tensor in trained_of(resumed).items():
        torch.testing.assert_close(tensor, after[name], atol=1e-6, rtol=1e-5)
        one, other = fresh.state[tensor], optimizer.state[trained_of(policy)[name]]
        torch.testing.assert_close(one["exp_avg"], other["exp_avg"], atol=1e-6, rtol=1e-4)
        assert one["step"] == 1
    written = load_file(found / "model.safetensors")
    for name, tensor in hf_weights(resumed):
        torch.testing.assert_close(written[name], tensor, atol=1e-6, rtol=1e-5)


def two_ranks(rank: int, world: int, folder: Path, out: Path) -> None:
    policy = adapted(folder, world=distributed.start(MeshConfig()))
    stir(policy)
    optimizer = optim.make_optimizer(policy, Config().optim)
    micros = pack(GROUPS, lambda g: g.rows, 1000, rank=rank, ranks=world)
    sum(policy(micro).sum() for micro in micros).backward()
    optim.step(optimizer, policy, 1.0, 0.0, 1e-2)
    saver = checkpoint.Checkpointer(out / "two", 2)
    saver.save(3, policy, optimizer, {}, make_tokenizer())
    saver.close()


def test_others_open_what_a_checkpoint_holds(folder, tmp_path):
    peft = pytest.importorskip("peft")
    policy = adapted(folder, world=distributed.start(MeshConfig()))
    stir(policy)
    optimizer = optim.make_optimizer(policy, Config().optim)
    logp(policy).sum().backward()
    optim.step(optimizer, policy, 1.0, 0.0, 1e-3)
    saver = checkpoint.Checkpointer(tmp_path, 2)
    saver.save(1, policy, optimizer, {}, make_tokenizer())
    saver.close()
    found, ids = tmp_path / "step-000001", torch.arange(3, 40)[None]
    merged = AutoModelForCausalLM.from_pretrained(found)
    settings = json.loads((found / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder)
    by_peft = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), found / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(by_peft(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)
        assert (merged(ids).logits - AutoModelForCausalLM.from_pretrained(folder)(ids).logits).abs().max() > 0.1

    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert json.loads((found / "config.json").read_text())["dtype"] == "float32"
    whole = plain(folder)
    with pytest.raises(UserError, match="has moments of other parameters; resume with the run's model.lora"):
        checkpoint.load_optimizer(found, whole, optim.make_optimizer(whole, Config().optim))
    shutil.rmtree(found / "adapter")
    with pytest.raises(UserError, match="step-000001: it has no adapters"):
        checkpoint.load_adapters(found, policy)


def test_adapters_of_another_shape_are_named(folder, tmp_path):
    policy = adapted(folder, world=distributed.start(MeshConfig()))
    saver = checkpoint.Checkpointer(tmp_path, 2)
    saver.save(1, policy, optim.make_optimizer(policy, Config().optim), {}, make_tokenizer())
    saver.close()
    found = tmp_path / "step-000001"
    other = adapted(folder, targets=["q_proj"])
    with pytest.raises(
        UserError, match=r"step-000001: its adapter .* and this run's nothing; resume with the run's own"
    ):
        checkpoint.load_adapters(found, other)


def test_what_cannot_be_adapted_is_refused(folder, tmp_path, monkeypatch):
    for target in ("nowhere", "lm_head", "embed_tokens", "input_layernorm"):
        with pytest.raises(
            UserError, match=rf"targets: {target} is no linear layer of the blocks; known: down_proj, gate"
        ):
            adapted(folder, targets=["q_proj", target])
    for targets in ([], ["mlp.up_proj"], ["0.self_attn.q_proj"]):
        with pytest.raises(ValueError, match="targets"):
            LoraConfig(rank=2, targets=targets)
    experts = save_model(tmp_path / "moe", "moe")
    with pytest.raises(UserError, match=r"mlp.experts holds experts, .*; name model.lora.targets"):
        adapted(experts)
    names = {name for name, _ in lora.adapted(adapted(experts, targets=["q_proj", "v_proj"]).lm)}
    assert {name.rsplit(".", 1)[-1] for name in names} == {"q_proj", "v_proj"}
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="PEFT is not installed; install the `lora` extra"):
        adapted(folder)


@pytest.mark.slow
def test_a_run_with_adapters_is_resumed_bit_for_bit(tmp_path):
    model = make_model(tmp_path / "model")
    options = {"model__lora__rank": 4, "checkpoint__every": 1, "train__steps": 4, "rollout__dtype": "float32"}
    options |= {"model__dtype": "bfloat16"}  # the merged weights on the disk are rounded, what the engine gets is not

    def train(name: str, *more: str, minutes: float = 1000.0) -> Path:
        run = tmp_path / name
        done = luffy(*arguments(run, model, *more, **options, train__max_minutes=minutes), cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return run

    whole = train("whole")
    halves = train("halves", minutes=1e-6)
    assert len(records(halves)) == 1
    base, other = model / "model.safetensors", make_model(tmp_path / "other", seed=1) / "model.safetensors"
    shutil.move(base, tmp_path / "kept")
    shutil.copy(other, base)
    done = luffy(*arguments(halves, model, "--resume", **options), cwd=tmp_path)
    assert done.returncode == 2
    assert "model is not what the run began with; bring its files back" in done.stderr
    shutil.move(tmp_path / "kept", base)
    train("halves", "--resume")
    assert without_times(records(whole)) == without_times(records(halves))
    assert_same_state(whole, halves, "step-000004")
    file = whole / "checkpoints" / "step-000004" / "adapter" / "adapter_model.safetensors"
    assert any(tensor.any() for name, tensor in load_file(file).items() if "lora_B" in name)
    # bfloat16 against float32: what the engine samples from follows the adapters, or the gap would grow with lr 0.01
    gaps = [record["rollout/logp_gap_mean"] for record in records(whole)]
    assert max(gaps) < 0.05
    [data] = (tmp_path / "cache" / "problems").glob("*/ood.parquet")
    few = ["--limit", "2", "--max-tokens", "8"]
    done = luffy("eval", "--model", whole, "--checkpoint", "2", "--data", data, *few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
