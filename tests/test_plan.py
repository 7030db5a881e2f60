"""`luffy plan`: what autograd keeps, what the named plans say, and what a user can get wrong."""

import dataclasses
import json
import resource
import subprocess
import sys

import pytest
import torch
from tiny import ROOT, luffy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from transformers import AutoConfig, AutoModelForCausalLM

from luffy import activations, attention, footprint, lora, plan, plan_text
from luffy.attention import Layout
from luffy.checkpoint.saving import FILE_BYTES
from luffy.config import CheckpointConfig, LoraConfig
from luffy.config_file import load_config
from luffy.errors import UserError
from luffy.footprint import Load, Segment, host_bytes, kept_by_block, moments, peak, saved_by_block
from luffy.machines import GIB, MACHINES, find_machine
from luffy.shapes import KNOWN, find_shape, shape_of

RECIPE = "luffy-qwen2.5-math-7b"
RECIPE_MODEL = "qwen2.5-math-7b-16k-think"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 128,
}


def asked(model: str, gpus: int, context: int | None = None, gpu: str = "h100", **sections):
    config = load_config(RECIPE, [f"--{key.replace('__', '.')}={value}" for key, value in sections.items()])
    return plan.ask(config, find_shape(model), find_machine(gpu), gpus, context)


# --- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_as_the_model_has_them(kind, tied):
    more = {"num_key_value_heads": 2, "tie_word_embeddings": tied, "head_dim": 16}
    config = AutoConfig.for_model(kind, **(SIZES | more))
    lm = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config, kind)
    assert shape.parameters == sum(p.numel() for p in lm.parameters())
    assert shape.block == sum(p.numel() for p in lm.model.layers[0].parameters())
    assert shape_of(config.to_dict(), kind) == shape


def test_known_shapes_have_the_published_number_of_parameters():
    published = {  # billions, from the model cards
        **{"smollm2-135m": 0.135, "qwen2.5-0.5b": 0.49, "qwen2.5-1.5b": 1.54, "qwen2.5-3b": 3.09, "qwen2.5-7b": 7.61},
        **{"qwen2.5-14b": 14.7, "qwen2.5-32b": 32.5, "qwen2.5-72b": 72.7, "qwen3-8b": 8.2, "qwen3-0.6b": 0.6},
        **{"llama-3.1-8b": 8.03, "llama-3.1-70b": 70.6, "llama-3.2-1b": 1.23, "gemma-2b": 2.51, "gemma-7b": 8.54},
    }
    for name, billions in published.items():
        assert KNOWN[name].parameters / 1e9 == pytest.approx(billions, rel=0.015), name


def test_a_folder_is_read_and_a_name_is_found_with_its_suffix(tmp_path):
    AutoConfig.for_model("qwen2", **SIZES, num_key_value_heads=1, max_position_embeddings=777).save_pretrained(tmp_path)
    found = find_shape(str(tmp_path))
    assert (found.hidden, found.kv_heads, found.positions, found.qkv_bias, found.window) == (64, 1, 777, True, None)
    for name in ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"):
        assert dataclasses.replace(find_shape(name), name="qwen2.5-7b") == KNOWN["qwen2.5-7b"]
    assert find_shape("embedded:smollm2-135m-instruct").layers == 30


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": 64}, "num_hidden_layers"),
        ({"num_experts": 8}, "mixture of experts"),
        ("[]", "must hold an object"),
        ("{", "not valid JSON"),
    ],
)
def test_configs_that_say_too_little_or_too_much(tmp_path, config, words):
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(UserError, match=words) as caught:
        find_shape(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_id_of_the_hub_costs_its_config_alone(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "llama"}))
    asked_for = []

    def download(*arguments):
        asked_for.append(arguments)
        return str(tmp_path / "config.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = find_shape("somebody/some-model")
    assert asked_for == [("somebody/some-model", "config.json")]
    assert (found.name, found.hidden, found.kv_heads) == ("somebody/some-model", 64, 4)

    def refuse(*_):
        raise OSError("no such repository\nadvice for programmers")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(UserError, match="cannot be had from the hub: no such repository$"):
        find_shape("somebody/some-model")


# --- memory --------------------------------------------------------------------------------------------------------


def one_block(kind: str, segments: tuple[Segment, ...], kv_heads: int, rank: int = 0):
    """(the first block of a model as a function, its input, what it is given beside that, the same as a load)."""
    config = AutoConfig.for_model(kind, **SIZES, num_key_value_heads=kv_heads, head_dim=16)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention.register()).to(torch.bfloat16)
    if rank:
        lora.adapt(lm, LoraConfig(rank=rank), torch.bfloat16, "base")
        lm.to(torch.bfloat16)  # as FSDP2 hands them to the forward pass
    body, tokens = lm.get_decoder(), sum(segment.tokens for segment in segments)
    spans, at = [], 0
    for segment in segments:
        begin, rows = at + segment.prompt, []
        for row in segment.rows:
            rows.append((begin, begin + row))
            begin += row
        spans.append(attention.Segment(at, at + segment.prompt, rows))
        at = begin
    hidden = torch.randn(1, tokens, 64, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(tokens)[None]
    rotations = body.rotary_emb(hidden, position_ids=positions)

    def call(hidden):
        return body.layers[0](
            hidden, position_embeddings=rotations, position_ids=positions, layout=Layout(spans, tokens)
        )

    shape = shape_of(config, kind)
    adapters, ranks = shape.adapters(rank)
    assert adapters == sum(p.numel() for name, p in lm.named_parameters() if lora.is_adapter(name))
    load = Load(shape=shape, tokens=tokens, targets=tokens, device="cpu", segments=segments)
    load = dataclasses.replace(load, adapters=adapters, adapter_ranks=ranks)
    return call, hidden, (*lm.parameters(), *rotations), load


def autograd_keeps(call, hidden, given) -> int:
    """Bytes that a block saves for its backward, weights and rotations apart."""
    kept, known = {}, {t.untyped_storage().data_ptr() for t in given}
    alive = []

    def note(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive.append(call(hidden))
    return sum(kept.values())


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "segments", [(Segment(32),), (Segment(16, (8,)), Segment(9, (7,))), (Segment(16, (8, 12)), Segment(10, (9, 3, 5)))]
)
def test_what_a_block_keeps_is_what_autograd_keeps(kind, kv_heads, segments, rank):
    *block, load = one_block(kind, segments, kv_heads, rank)
    assert saved_by_block(load) == autograd_keeps(*block)


def test_bench_plan_runs_the_trainer_on_what_it_plans_for():
    """The figures of docs/planning.md come from it: a change of the trainer must not leave it behind."""
    code = (
        "import dataclasses, bench.plan as b\n"
        "for case in b.CASES[1], b.CASES[3], b.CASES[-1]:\n"
        "    small = case.model | {'num_hidden_layers': 2, 'hidden_size': 64, 'intermediate_size': 64}\n"
        "    small |= {'vocab_size': 256, 'num_attention_heads': 4, 'num_key_value_heads': 2}\n"
        "    case = dataclasses.replace(case, model=small, prompt=8, rows=(9, 9), groups=4, budget=50)\n"
        "    assert b.run(case)[0] == case.load.tokens == 48 and case.load.accumulates\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


LOAD = Load(shape=KNOWN["qwen2.5-7b"], tokens=8192, targets=8192, shards=8, recompute=True)


def test_state_is_sixteen_bytes_a_parameter_over_the_ranks_that_share_it():
    _, parts = peak(LOAD)
    share = KNOWN["qwen2.5-7b"].parameters / 8
    assert parts["weights"] == parts["gradients"] == 4 * share
    assert parts["optimizer"] == 8 * share
    _, parts = peak(dataclasses.replace(LOAD, on_cpu=True))
    assert parts["weights"] == parts["gradients"] == parts["optimizer"] == 0


def test_adapters_are_all_that_has_a_state():
    shape = LOAD.shape
    adapters, ranks = shape.adapters(16)
    assert shape.adapters(16, ["q_proj", "down_proj"]) == (16 * (2 * 3584 + 18944 + 3584), 32)
    _, parts = peak(dataclasses.replace(LOAD, adapters=adapters, adapter_ranks=ranks))
    trained = shape.layers * adapters
    assert trained == 40_370_176  # PEFT's count for Qwen2.5-7B at rank 16
    assert parts["weights"] == (2 * shape.parameters + 4 * trained) / 8
    assert parts["gradients"] == 4 * trained / 8
    assert parts["optimizer"] == 8 * trained / 8
    whole, little = (
        plan.evaluate(a, plan.configured(a))
        for a in (asked(RECIPE_MODEL, 8), asked(RECIPE_MODEL, 8, model__lora__rank=16))
    )
    assert little.needed < whole.needed - 15e9
    assert little.work.flops < 0.8 * whole.work.flops
    assert little.work.trained == trained
    assert max(little.phases["optimizer"]) < 0.01 * min(whole.phases["optimizer"])
    on_cpu = dataclasses.replace(LOAD, adapters=adapters, adapter_ranks=ranks, on_cpu=True)
    assert host_bytes(on_cpu) == (2 * shape.parameters + 16 * trained) / 8
    with pytest.raises(UserError, match="a plan does not know up_projection; known: q_proj"):
        shape.adapters(16, ["up_projection"])


class Kept(TorchDispatchMode):
    """Bytes of the results that selective recomputation keeps."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.bytes = rank or None, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if activations._keep_products(self.rank, None, op, *args) == CheckpointPolicy.MUST_SAVE:
            # of attention: the output and the log-sum-exp
            self.bytes += sum(tensor.nbytes for tensor in (out[:2] if isinstance(out, tuple) else [out]))
        return out


@pytest.mark.parametrize("rank", [0, 4])
def test_what_selective_keeps_of_a_block(rank):
    """Its products and attention; LoRA's own products are computed again."""
    call, hidden, _, load = one_block("llama", (Segment(32),), 2, rank)
    with Kept(rank) as kept:
        call(hidden)
    assert kept.bytes + hidden.nbytes == kept_by_block(dataclasses.replace(load, recompute="selective"))


def test_copies_of_prompts_count_on_a_gpu():
    a = asked(RECIPE_MODEL, 8)
    load, _ = plan.load_of(a, plan.configured(a))
    rows, prompt, answer = 8, a.prompt, a.answer
    assert load.copied == pytest.approx(rows * prompt / (prompt + rows * answer))
    keys = 2 * 2 * load.shape.key * load.tokens
    more = saved_by_block(load) - saved_by_block(dataclasses.replace(load, copied=0.0))
    assert more == pytest.approx(load.copied * keys)


def test_what_saves_memory_saves_it():
    def needs(**changes):
        return sum(peak(dataclasses.replace(LOAD, **changes))[1].values())

    whole = needs(recompute=False)
    assert needs(recompute=True) < needs(recompute="selective") < whole
    assert needs(offload=True) < needs()
    assert needs(mlp_tokens=1024) < needs()
    assert needs(tokens=4096, targets=4096) < needs()
    assert needs(shards=16) < needs()
    assert kept_by_block(LOAD) == 2 * 3584 * 8192
    assert set(moments(LOAD)) > {"head, forward", "first block backward"}


def test_a_cpu_holds_its_libraries_and_the_copies_of_a_checkpoint():
    """A quickstart of 44 steps had 10.2 GiB in the end (perf/peak_memory_gib), after saves at 20 and 40; of 5.4 in its
    first step."""
    config = load_config("quickstart")
    asked = plan.ask(config, find_shape(config.model.name), find_machine("cpu"), 1, context=29 + 36)
    asked = dataclasses.replace(asked, prompt=29, answer=36, sampled=36)
    held = plan.evaluate(asked, plan.configured(asked)).needed / GIB
    assert held == pytest.approx(10.2, rel=0.15)
    seldom = asked.config.model_copy(update={"checkpoint": CheckpointConfig(every=0)})
    asked = dataclasses.replace(asked, config=seldom)
    assert plan.evaluate(asked, plan.configured(asked)).parts[footprint.COPIES] == 0
    small = dataclasses.replace(asked.machine, memory=7.5 * GIB)  # enough for an update, and for nothing beside it
    asked = dataclasses.replace(asked, config=config, machine=small)
    assert sum(peak(plan.load_of(asked, plan.configured(asked))[0])[1].values()) < asked.memory
    assert not plan.evaluate(asked, plan.configured(asked)).fits


WRITES = """
import sys, torch, torch.distributed as dist
from luffy.process import keep_freed_memory
from luffy.staging import Staged, save_shards

def resident(key):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

keep_freed_memory()
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
ones = {str(n): torch.ones(2**20) for n in range(16)}
save_shards({"first": Staged.copy_of("first", torch.ones(1))}, f"{sys.argv[1]}/first", 2**31, dist.group.WORLD)
before = resident("VmRSS")
save_shards({k: Staged.copy_of(k, t) for k, t in ones.items()}, f"{sys.argv[1]}/all", 2**31, dist.group.WORLD)
print((resident("VmHWM") - before) / 2**26)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_writing_takes_the_copies_and_twice_a_file(tmp_path):
    assert footprint.FILE == FILE_BYTES
    done = subprocess.run(
        [sys.executable, "-c", WRITES, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == pytest.approx(3, rel=0.1)


def test_a_cpu_keeps_what_it_frees():
    load = dataclasses.replace(LOAD, device="cpu", shards=1)
    name, parts = peak(load)
    live = sum(moments(load)[name].values())
    assert sum(parts.values()) > live > 16 * load.shape.parameters


# --- plans ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "gpus", "context"),
    [("Qwen/Qwen2.5-7B", 8, 8192), ("Qwen/Qwen2.5-7B", 8, 32768), ("Qwen/Qwen2.5-7B", 32, 131072)],
)
def test_7b_fits_with_a_vllm_beside_it(model, gpus, context):
    a = asked(model, gpus, context)
    configured, found, apart = plan.answer(a)
    assert configured.fits == (context <= 9216)  # what the recipe is for
    assert configured.fits or "vLLM KV cache" in configured.problem or "workspace" in configured.problem
    assert found.fits
    assert apart is None
    assert found.needed <= a.memory < MACHINES["h100"].memory
    choice = found.choice
    assert gpus % (choice.replicate * choice.sequence) == 0
    assert a.shape.heads % choice.sequence == 0
    assert choice.tokens_per_micro >= context  # a sequence is never cut
    assert (choice.sequence > 1) == (context > 8192)
    same = plan.ask(load_config(RECIPE, a.options(choice).split()), a.shape, a.machine, gpus)
    again = plan.evaluate(same, plan.configured(same))
    assert again.parts == found.parts  # the options say it all, lengths included
    low, high = plan_text.step_time.total(found.phases)
    assert 0 < low < high
    assert {"rollout", "update", "sync", "optimizer"} == set(found.phases)


def test_72b_does_not_fit_beside_a_whole_vllm_on_every_gpu():
    a = asked("Qwen/Qwen2.5-72B", 64, 8192)
    configured, found, apart = plan.answer(a)
    assert not configured.fits
    assert not found.fits
    assert found.parts["vLLM weights"] == pytest.approx(145.4e9, rel=0.01)
    assert "most of it is vLLM weights" in found.problem
    assert apart.fits
    assert set(apart.phases) == {"update", "optimizer"}
    text = plan_text.text(a, configured, found, apart)
    for words in ("nothing fits", "would help", "whole model on every GPU", "the update alone", "--mesh.sequence"):
        assert words in text


def test_more_gpus_and_more_memory_never_hurt():
    def step(gpu, gpus):
        found = plan.suggest(asked("qwen2.5-7b", gpus, 8192, gpu))
        assert found.fits
        return sum(plan_text.step_time.total(found.phases))

    assert step("h200", 8) <= step("h100", 8)
    assert step("h100", 32) < step("h100", 16) < step("h100", 8)


def test_a_small_gpu_is_refused_with_the_part_and_the_excess():
    a = asked("qwen2.5-14b", 1, 8192, "l40s")
    configured, found, apart = plan.answer(a)
    assert not found.fits
    assert "too many; most of it is" in found.problem
    assert "nothing fits" in plan_text.text(a, configured, found, apart)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("qwen2.5-7b", 0, 8192), "--gpus must be at least 1"),
        (("qwen2.5-7b", 8, 200_000), "131,072 positions"),
        (("qwen2.5-7b", 8, 1), "--context must be at least 2"),
        (("qwen3-8b", 8, 65536), "40,960 positions"),
        (("qwen9-7b", 8, 8192), "did you mean qwen"),
        (("./nowhere", 8, 8192), "./nowhere"),
        (("qwen2.5-7b", 8, 8192, "h1000"), "--gpu must be one of"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(arguments, words):
    with pytest.raises(UserError, match=words) as caught:
        asked(*arguments)
    assert "\n" not in str(caught.value)


def test_a_mesh_that_does_not_divide():
    with pytest.raises(UserError, match="8 GPUs cannot be split"):
        plan.answer(asked("qwen2.5-7b", 8, 8192, mesh__replicate=3))
    with pytest.raises(UserError, match="must divide the 28 attention heads"):
        plan.answer(asked("qwen2.5-7b", 8, 8192, mesh__sequence=8))


def test_windows_and_soft_caps_are_refused():
    a = asked("qwen2.5-7b", 8, 8192)
    for change, words in (({"window": 512}, "window of 512"), ({"attention_softcap": True}, "soft cap")):
        with pytest.raises(UserError, match=words):
            plan.ask(a.config, dataclasses.replace(a.shape, **change), a.machine, 8, 8192)


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_answers_at_once_and_imports_no_torch(tmp_path):
    code = (
        "import sys; from luffy.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'vllm'} & sys.modules.keys()\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    command = [sys.executable, "-c", code, "plan", RECIPE, "--model", "Qwen/Qwen2.5-7B", "--context", "32768"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # of its own time: what else runs on the machine must not fail it
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1.5
    for words in ("7.62 B parameters", "8 x h100", "vLLM KV cache", "optimizer", "suggested", "assumed, not measured"):
        assert words in done.stdout
    assert str(tmp_path) not in done.stdout


def test_the_command_says_json_and_refuses_in_one_sentence(tmp_path):
    done = luffy("plan", "quickstart", "--gpus", "1", "--gpu", "cpu", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["model"]["parameters"] == KNOWN["smollm2-135m"].parameters
    assert record["configured"]["needed_bytes"] == pytest.approx(sum(record["configured"]["parts"].values()))
    assert 2 * GIB < record["configured"]["needed_bytes"] < 12 * GIB
    assert record["configured"]["seconds"] == {}  # no rates are known
    done = luffy("plan", RECIPE, "--model", "qwen2.5-7b", "--mesh.replicate=3", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("luffy: plan: 8 GPUs cannot be split")
    assert done.stderr.count("\n") == 1
    assert "--optim.lrr" in luffy("plan", RECIPE, "--optim.lrr", "1", cwd=tmp_path).stderr
