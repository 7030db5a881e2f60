"""Checkpoints and files: whole or absent. Several ranks: test_resharding.py."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny import ROOT, make_model, make_tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from luffy import checkpoint, optim
from luffy.checkpoint import Checkpointer, saving
from luffy.config import Config, ModelConfig, OptimConfig
from luffy.config_file import load_config
from luffy.errors import UserError
from luffy.files import disk_errors, new_folder, read_jsonl, remove_folder, sweep, write_text
from luffy.load import empty_lm, load_weights
from luffy.manifest import MANIFEST, damage, read_manifest, verify
from luffy.metrics import MetricsLog
from luffy.model import Policy, shard
from luffy.run_folder import RunFolder
from luffy.weights import weights_of


def load(folder: Path):
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    policy = shard(Policy(empty_lm(str(folder), ModelConfig()), 1.0), mesh, torch.float32)
    load_weights(policy, str(folder), torch.device("cpu"))
    return policy, optim.make_optimizer(policy, OptimConfig(lr=1e-2))


@pytest.fixture
def trained(tmp_path):
    """A sharded policy after one optimizer step, and its optimizer."""
    policy, optimizer = load(make_model(tmp_path / "m"))
    for param in policy.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return policy, optimizer


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def write(trained, folder):
    """write(step, ...) -> the path, once it is on the disk."""
    made: dict[tuple, Checkpointer] = {}

    def act(step: int, score: float | None = None, loop=None, keep: int = 9, best: str | None = None) -> Path:
        if (keep, best) not in made:
            made[keep, best] = Checkpointer(folder, keep, best=best)
        made[keep, best].save(step, *trained, loop or {}, make_tokenizer(), score)
        made[keep, best].wait()
        return folder / f"step-{step:06d}"

    yield act
    for writer in made.values():
        writer.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def one_line(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_file_that_cannot_be_written_is_named_as_it_was_asked_for(tmp_path):
    with pytest.raises(UserError) as raised:
        write_text(tmp_path / "none" / "page.html", "")
    assert str(raised.value) == (
        f"cannot write page.html: there is no folder {tmp_path}/none; nothing was replaced; make it, or mend the path, "
        f"and try again"
    )
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"Not a directory: {tmp_path}/file/page.html; nothing was replaced"):
        write_text(tmp_path / "file" / "page.html", "")
    with (
        pytest.raises(UserError, match=rf"Is a directory: {tmp_path}/exp.1.tmp; nothing was replaced"),
        disk_errors("run"),
    ):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", f"{tmp_path}/exp.1.tmp")  # somebody's own name


def test_a_checkpoint_is_a_model_folder_and_restores_the_optimizer(trained, write):
    policy, optimizer = trained
    path = write(7, loop={"tokens": 5})
    assert checkpoint.load_loop(path) == {"tokens": 5, "step": 7}
    again, fresh = load(path)
    checkpoint.load_optimizer(path, again, fresh)
    theirs = AutoModelForCausalLM.from_pretrained(path)
    assert theirs.dtype == torch.float32
    for (name, a), (_, b) in zip(policy.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor()), name
        assert torch.equal(a.full_tensor(), theirs.get_parameter(name.removeprefix("lm."))), name
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[a][key].full_tensor(), fresh.state[b][key].full_tensor()), name
        assert fresh.state[b]["step"].item() == 1
    assert [file.name for file in path.glob("*.safetensors")] == ["model.safetensors"]  # vLLM reads every one there
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == 2
    assert json.loads((path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_the_file_is_laid_out_as_the_format_asks(write):
    file = write(1) / "model.safetensors"
    rewritten = file.with_name("other")
    save_file(load_file(file), rewritten, {"format": "pt"})
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
    assert file.stat().st_size == pytest.approx(rewritten.stat().st_size, abs=64)


def test_what_a_forward_pass_gathered_is_saved_as_shards(trained, write):
    policy, _ = trained
    before = {name: tensor.full_tensor() for name, tensor in weights_of(policy).items()}
    policy.unshard()
    assert not any(isinstance(tensor, DTensor) for tensor in policy.parameters() if tensor.shape[0] > 200)
    path = write(1)
    assert all(isinstance(tensor, DTensor) for tensor in weights_of(policy).values())
    saved = load_file(path / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in before.items())
    assert len(list((path / "trainer" / "optimizer").iterdir())) == 1


def test_only_the_newest_are_kept(write, folder):
    for step in (1, 2, 3):
        write(step, keep=2)
    assert names(folder) == ["step-000002", "step-000003"]
    assert checkpoint.latest(folder) == folder / "step-000003"


def test_the_best_is_kept_too_and_the_newest_never_goes(write, folder):
    for step, score in ((1, 0.1), (2, 0.9), (3, float("nan")), (4, None), (5, 0.5), (6, 0.2)):
        write(step, score, keep=1, best="accuracy")
        assert f"step-{step:06d}" in names(folder)
    assert names(folder) == ["step-000002", "step-000006"]
    assert read_manifest(folder / "step-000002")["score"] == {"by": "accuracy", "value": 0.9}
    write(7, 0.9, keep=1, best="accuracy")
    assert names(folder) == ["step-000007"]  # as good, and newer
    write(8, 0.0, keep=1)
    assert names(folder) == ["step-000008"]


def test_one_is_chosen_by_its_age_its_score_or_its_step(write, folder):
    with pytest.raises(UserError, match="run folder without a checkpoint"):
        checkpoint.choose(folder, "newest")
    write(1)
    with pytest.raises(UserError, match="no checkpoint in .* has a score"):
        checkpoint.choose(folder, "best")
    for step, score in ((2, 0.7), (3, 0.7), (10, 0.1)):
        write(step, score)
    chosen = {which: checkpoint.choose(folder, which).name for which in ("newest", "best", "2")}
    assert chosen == {"newest": "step-000010", "best": "step-000003", "2": "step-000002"}
    for which in ("5", "first"):
        with pytest.raises(UserError, match=f"newest, best or one of the steps 1, 2, 3, 10, got {which}"):
            checkpoint.choose(folder, which)


def test_steps_are_numbers(write, folder):
    write(999_999)
    write(1_000_000)
    (folder / "step-notes").mkdir()
    assert [path.name for path in checkpoint.all_checkpoints(folder)] == ["step-999999", "step-1000000"]


def test_saving_returns_at_once_and_keeps_what_the_weights_were(trained, folder, monkeypatch):
    policy, optimizer = trained
    before = {name: tensor.full_tensor().clone() for name, tensor in weights_of(policy).items()}
    go_on, real = threading.Event(), saving.put_in_place

    def slow(*args):
        assert go_on.wait(60)
        real(*args)

    monkeypatch.setattr(saving, "put_in_place", slow)
    writer = Checkpointer(folder, 9)
    loop = {"tokens": 1}
    writer.save(1, policy, optimizer, loop, make_tokenizer())
    loop["tokens"] = 2
    with torch.no_grad():
        for param in policy.parameters():
            param.fill_(7)
            optimizer.state[param]["exp_avg"].fill_(7)
    assert checkpoint.latest(folder) is None
    go_on.set()
    writer.save(2, policy, optimizer, loop, make_tokenizer())  # waits for the first
    assert checkpoint.all_checkpoints(folder)[0].name == "step-000001"
    writer.wait()
    writer.close()
    first, second = (load_file(path / "model.safetensors") for path in checkpoint.all_checkpoints(folder))
    assert all(torch.equal(first[name], value) for name, value in before.items())
    assert all((value == 7).all() for value in second.values())
    assert checkpoint.load_loop(folder / "step-000001")["tokens"] == 1
    moments = load_file(next((folder / "step-000001" / "trainer" / "optimizer").iterdir()))
    assert not any((value == 7).all() for value in moments.values())


class FileSizeLimit:
    """Real write errors, in the middle of a file."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_disk_that_takes_no_more_leaves_the_previous_checkpoint(trained, write, folder):
    write(1)
    size = (folder / "step-000001" / "model.safetensors").stat().st_size
    for limit in (50, size // 2, size + 4096):  # in the small files, in the weights, in the moments
        with FileSizeLimit(limit), pytest.raises(UserError, match="File too large"):
            write(2)
        assert names(folder) == ["step-000001"]
    verify(folder / "step-000001")
    write(2)
    assert names(folder) == ["step-000001", "step-000002"]


def test_what_failed_in_the_background_is_raised_by_the_next_call(trained, write, folder, capsys):
    write(1)
    writer = Checkpointer(folder, 9)
    with FileSizeLimit(200_000):
        writer.save(2, *trained, {}, make_tokenizer())
        writer._pending.exception()  # until the writing is over
    with pytest.raises(UserError, match="File too large"):
        writer.save(3, *trained, {}, make_tokenizer())
    writer.save(4, *trained, {}, make_tokenizer())  # it was said once
    writer.wait()
    with FileSizeLimit(200_000):
        writer.save(5, *trained, {}, make_tokenizer())
        writer.close()
    assert "the last checkpoint was not written" in one_line(capsys)
    assert names(folder) == ["step-000001", "step-000004"]


def test_a_copy_seen_half_done_is_never_a_checkpoint(write, tmp_path, capsys):
    whole = write(2)
    files = [str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()]
    other = tmp_path / "mount"
    shutil.copytree(write(1), other / "step-000001")
    for seed in range(3):
        order = random.Random(seed).sample(files, len(files))
        copy = other / "step-000002"
        for number, name in enumerate(order):
            assert checkpoint.latest(other).name == "step-000001", order[:number]
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            content = (whole / name).read_bytes()
            (copy / name).write_bytes(content[:-1])
            assert checkpoint.latest(other).name == "step-000001", (order[:number], name)
            (copy / name).write_bytes(content)
        assert checkpoint.latest(other).name == "step-000002"
        shutil.rmtree(copy)
    assert "step-000002 lacks" in one_line(capsys)


def test_a_mount_that_loses_what_it_is_given_is_found_out(trained, write, folder, monkeypatch):
    write(1)
    real = saving.put_in_place

    def lossy(temporary, path):
        real(temporary, path)
        os.truncate(path / "model.safetensors", 1000)

    monkeypatch.setattr(saving, "put_in_place", lossy)
    with pytest.raises(UserError, match="right after it was written"):
        write(2, keep=1)
    assert checkpoint.latest(folder).name == "step-000001"


def test_other_bytes_of_the_same_size_are_noticed_on_resuming(write, folder, capsys):
    for step in (1, 2, 3):
        path = write(step)
    assert checkpoint.resumable(folder) == path
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\xff\x01\x02")
    (folder / "step-000002" / "trainer" / "loop.json").unlink()
    assert checkpoint.latest(folder) == path
    assert checkpoint.resumable(folder).name == "step-000001"
    said = one_line(capsys)
    assert "step-000003 is damaged: the contents of model.safetensors" in said
    assert "step-000002 lacks trainer/loop.json; it is skipped" in said
    assert checkpoint.resumable(folder / "none") is None
    write(3)  # the damaged one is replaced
    assert checkpoint.resumable(folder).name == "step-000003"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 9, "files": {}}'])
def test_a_damaged_manifest_is_one_sentence(text, tmp_path):
    (tmp_path / "step-000001" / "trainer").mkdir(parents=True)
    (tmp_path / "step-000001" / MANIFEST).write_text(text)
    assert "step-000001" in damage(tmp_path / "step-000001")
    assert checkpoint.latest(tmp_path) is None


def test_a_half_written_checkpoint_is_not_one(tmp_path, capsys):
    (tmp_path / "step-000005" / "trainer").mkdir(parents=True)
    (tmp_path / "step-000005" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "step-000005" / "trainer" / "loop.json").write_text("{}")  # what an earlier version left is none either
    assert checkpoint.latest(tmp_path) is None
    assert "step-000005 has no trainer/manifest.json: it was never finished" in one_line(capsys)


def test_a_checkpoint_of_another_model_is_refused_by_name(write, tmp_path):
    path = write(1)
    other = make_model(tmp_path / "other")
    change = {"vocab_size": 300}
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | change))
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.zeros(300, 64)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    policy, optimizer = load(other)
    with pytest.raises(UserError, match=r"another model: model.embed_tokens.weight has shape \(259, 64\) there and"):
        checkpoint.load_optimizer(path, policy, optimizer)
    with pytest.raises(UserError, match="model.embed_tokens.weight must have shape"):
        load_weights(policy, str(path), torch.device("cpu"))


def test_damaged_moments_are_one_sentence(trained, write):
    path = write(1)
    file = next((path / "trainer" / "optimizer").iterdir())
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="checkpoint step-000001"):
        checkpoint.load_optimizer(path, *trained)


SAVES = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tiny import make_tokenizer
from test_checkpoint import load
from luffy import checkpoint

def saves(model, folder):
    policy, optimizer = load(model)
    writer, tokenizer = checkpoint.Checkpointer(folder, 2), make_tokenizer()
    newest = checkpoint.latest(folder)
    step = int(newest.name[5:]) if newest else 0
    while True:
        step += 1
        with torch.no_grad():
            for param in policy.parameters():
                param.fill_(step)
        writer.save(step, policy, optimizer, {}, tokenizer)
        if step == 1:
            writer.wait()

for line in sys.stdin:
    if (child := os.fork()) == 0:
        saves(*map(Path, sys.argv[1:]))
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


def test_killed_at_any_moment_the_previous_checkpoint_is_whole(tmp_path, folder):
    """kill -9 into a process that does nothing but save."""
    code = [sys.executable, "-c", SAVES, str(make_model(tmp_path / "m")), str(folder)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    leftovers, before, chance = 0, 0, random.Random(0)
    with subprocess.Popen(code, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        for _ in range(8):
            print("go", file=parent.stdin, flush=True)
            child = int(parent.stdout.readline())
            until = time.monotonic() + 60
            while newest_step(folder) <= before:
                assert time.monotonic() < until, "it saves nothing"
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.3))
            os.kill(child, signal.SIGKILL)
            assert parent.stdout.readline() == "gone\n"
            leftovers += any(name.startswith(".") for name in names(folder))
            sweep(folder, "step-*")
            assert not [name for name in names(folder) if name.startswith(".")]
            newest = checkpoint.resumable(folder)
            assert newest == checkpoint.latest(folder)
            step = int(newest.name[5:])
            assert step > before
            assert all((value == step).all() for value in load_file(newest / "model.safetensors").values())
            before = step
        parent.stdin.close()
    assert leftovers  # it was hit while it wrote


def newest_step(folder: Path) -> int:
    return max((int(path.name[5:]) for path in folder.glob("step-*")), default=0)


def test_a_folder_that_goes_is_gone_at_once(tmp_path, monkeypatch):
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "file").write_text("x")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed right after the renaming
    remove_folder(tmp_path / "step-1")
    monkeypatch.undo()
    assert names(tmp_path) == [".step-1.tmp"]
    sweep(tmp_path, "step-*")
    assert names(tmp_path) == []


def test_new_folder_vanishes_when_its_block_fails(tmp_path):
    def fail():
        with new_folder(tmp_path / "x") as new:
            (new / "a").write_text("a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_is_tidied_up_and_nothing_else(tmp_path):
    for name in (".step-1.tmp", "step-2", ".step-2.old", ".step-3.old", ".mine.tmp", ".mine.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    sweep(tmp_path, "step-*")
    left = {path.name: (path / "file").read_text() for path in tmp_path.iterdir()}
    mine = {".mine.tmp": ".mine.tmp", ".mine.old": ".mine.old"}
    assert left == {"step-2": "step-2", "step-3": ".step-3.old"} | mine


def test_a_run_folder_is_one_process_at_a_time(tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.lock(), pytest.raises(UserError, match="another process is training in"):
        RunFolder(tmp_path / "run").lock()
    run.lock().close()


def test_a_full_disk_costs_the_log_its_last_line_and_no_traceback(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", 0)
    log.write(1, {"x": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "m.jsonl").stat().st_size + 5, before[1]))
    try:
        with pytest.raises(UserError, match="metrics: "):
            log.write(2, {"x": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.close()
    assert [r["x"] for r in read_jsonl(tmp_path / "m.jsonl")] == [1.0]


def test_write_text_replaces_whole_files_only(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_text(file, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_metrics_log_forgets_what_followed_the_step_it_goes_on_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2, 3):
        log.write(step, {"x": float("nan") if step == 3 else float(step)})
    log.close()
    assert [r["x"] for r in read_jsonl(path)] == [1.0, 2.0, None]
    with path.open("a") as file:
        file.write('{"step": 4, "x"')  # killed while writing
    log = MetricsLog(path, 2)
    log.write(3, {"x": 9.0})
    log.close()
    assert [(r["step"], r["x"]) for r in read_jsonl(path)] == [(1, 1.0), (2, 2.0), (3, 9.0)]


def test_a_run_folder_is_resumed_only_with_its_own_settings(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.check(Config(), resume=False)
    run.open(Config())
    assert json.loads((run.path / "environment.json").read_text())["packages"]
    with pytest.raises(UserError, match="already holds a run"):
        run.check(Config(), resume=False)
    longer = Config()
    longer.train.steps = 900
    longer.eval.every = 3
    run.check(longer, resume=True)
    run.open(longer)
    assert load_config(str(run.path / "config.toml")).train.steps == 900
    falling = Config()
    falling.optim.schedule = "linear"  # whose rate at a step depends on the last step
    with pytest.raises(UserError, match="optim.schedule"):
        run.check(falling, resume=True)
    other = Config()
    other.objective.gamma = 0.5
    with pytest.raises(UserError, match="objective.gamma"):
        run.check(other, resume=True)


def test_a_falling_rate_is_not_resumed_to_another_end(tmp_path):
    run, config = RunFolder(tmp_path / "run"), Config()
    config.optim.schedule = "linear"
    run.open(config)
    config.train.max_minutes = 3.0
    run.check(config, resume=True)
    config.train.steps += 1
    with pytest.raises(UserError, match="train.steps"):
        run.check(config, resume=True)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot open the run folder"):
        RunFolder(tmp_path / "file" / "run").open(Config())


def test_a_checkpoint_before_any_update_can_be_resumed(tmp_path, folder):
    policy, optimizer = load(make_model(tmp_path / "m"))
    writer = Checkpointer(folder, 1)
    writer.save(1, policy, optimizer, {}, make_tokenizer())
    writer.wait()
    writer.close()
    checkpoint.load_optimizer(folder / "step-000001", policy, optimizer)
    assert not any(optimizer.state[param] for param in policy.parameters())


def test_the_environment_names_no_user_and_no_path(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.open(Config())
    text = (run.path / "environment.json").read_text()
    assert str(Path.home()) not in text
    assert str(tmp_path) not in text
