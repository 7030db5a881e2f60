"""Checkpoints and files: whole or absent."""

import json
import resource
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_tokenizer

from luffy import checkpoint, distributed, optim
from luffy.config import Config, ModelConfig, OptimConfig, load_config
from luffy.errors import UserError
from luffy.files import new_folder, read_jsonl, sweep, write_text
from luffy.metrics import MetricsLog
from luffy.model import Policy, load_lm, shard
from luffy.run_folder import RunFolder


@pytest.fixture
def trained(tmp_path):
    """A sharded policy after one optimizer step, and its optimizer."""
    mesh, _ = distributed.init()
    policy = shard(Policy(load_lm(str(make_model(tmp_path / "m")), ModelConfig()), 1.0), mesh, torch.float32)
    optimizer = optim.make_optimizer(policy, OptimConfig(lr=1e-2))
    for param in policy.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return policy, optimizer


def test_a_checkpoint_is_a_model_folder_and_restores_the_optimizer(trained, tmp_path):
    policy, optimizer = trained
    path = checkpoint.save(tmp_path / "c", 7, policy, optimizer, {"tokens": 5}, make_tokenizer(), keep=1)
    assert checkpoint.load_loop(path) == {"tokens": 5, "step": 7}
    mesh, _ = distributed.init()
    again = shard(Policy(load_lm(str(path), ModelConfig()), 1.0), mesh, torch.float32)
    fresh = optim.make_optimizer(again, OptimConfig(lr=1e-2))
    checkpoint.load_optimizer(path, again, fresh)
    for (name, a), (_, b) in zip(policy.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor()), name
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[a][key].full_tensor(), fresh.state[b][key].full_tensor()), name
        assert fresh.state[b]["step"].item() == 1


def test_only_the_newest_are_kept(trained, tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, *trained, {}, make_tokenizer(), keep=2)
    assert [path.name for path in checkpoint.all_checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000003"


def test_a_disk_that_takes_no_more_leaves_the_previous_checkpoint(trained, tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, 1, *trained, {}, make_tokenizer(), keep=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # real write errors, in the middle of a file
    try:
        with pytest.raises(UserError, match="earlier checkpoints are intact|File too large"):
            checkpoint.save(folder, 2, *trained, {}, make_tokenizer(), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in folder.iterdir()] == ["step-000001"]
    assert checkpoint.load_loop(folder / "step-000001")["step"] == 1


def test_a_half_written_checkpoint_is_not_one(tmp_path):
    (tmp_path / "step-000005").mkdir()
    (tmp_path / "step-000005" / "model.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) is None


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
    log = MetricsLog(tmp_path / "m.jsonl", tmp_path / "tensorboard", 0)
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
    log = MetricsLog(path, None, 0)
    for step in (1, 2, 3):
        log.write(step, {"x": float("nan") if step == 3 else float(step)})
    log.close()
    assert [r["x"] for r in read_jsonl(path)] == [1.0, 2.0, None]
    with path.open("a") as file:
        file.write('{"step": 4, "x"')  # killed while writing
    log = MetricsLog(path, None, 2)
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


def test_a_checkpoint_before_any_update_can_be_resumed(tmp_path):
    mesh, _ = distributed.init()
    policy = shard(Policy(load_lm(str(make_model(tmp_path / "m")), ModelConfig()), 1.0), mesh, torch.float32)
    optimizer = optim.make_optimizer(policy, OptimConfig())
    path = checkpoint.save(tmp_path / "c", 1, policy, optimizer, {}, make_tokenizer(), keep=1)
    checkpoint.load_optimizer(path, policy, optimizer)
    assert not any(optimizer.state[param] for param in policy.parameters())


def test_the_environment_names_no_user_and_no_path(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.open(Config())
    text = (run.path / "environment.json").read_text()
    assert str(Path.home()) not in text
    assert str(tmp_path) not in text
