"""Recipes of two stages: what they are read as, and that a run of both survives what a run of one does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import OPTIONS, assert_same_state, records, without_times
from tiny import luffy

from luffy.config_file import load_config, load_stages
from luffy.errors import UserError
from luffy.run_folder import RunFolder
from luffy.stages import due

STAGES = {
    "train.steps": 4,
    "eval.every": 0,
    "checkpoint.every": 1,
    "first.objective.name": "sft",
    "first.optim.lr": 0.003,
    "first.train.steps": 5,
}


def arguments(run: Path, model: Path, *more: str, **options) -> list[str]:
    flat = OPTIONS | {"model.name": model} | (options or STAGES)
    return ["train", "quickstart", "--run-dir", str(run), *more, *[f"--{k}={v}" for k, v in flat.items()]]


def run_to_end(home: Path, name: str, *more: str) -> Path:
    done = luffy(*arguments(home / name, home / "model", *more), cwd=home, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return home / name


@pytest.fixture(scope="module")
def whole(home) -> Path:
    return run_to_end(home, "whole")


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def assert_same_end(run: Path, other: Path) -> None:
    """Both stages, bit for bit."""
    for a, b, step in ((run / "first", other / "first", "step-000005"), (run, other, "step-000004")):
        assert without_times(records(a)) == without_times(records(b))
        assert_same_state(a, b, step)


def test_the_second_stage_is_a_run_of_its_own_from_the_firsts_last_checkpoint(home, whole):
    first, second = result(whole / "first"), result(whole)
    assert (first["objective"], first["steps"], second["objective"], second["steps"]) == ("sft", 5, "luffy", 4)
    assert second["first"]["checkpoint"] == "first/checkpoints/step-000005"
    assert (second["first"]["objective"], second["first"]["steps"]) == ("sft", 5)
    assert "first" not in first
    accuracy = [(one["name"], one["accuracy"]) for one in first["after"]]
    assert [(one["name"], one["accuracy"]) for one in second["before"]] == accuracy
    assert records(whole)[0]["actor/updates"] == records(whole / "first")[0]["actor/updates"]

    config = load_config(str(whole / "config.toml"))
    assert config.model.name == str(whole / "first" / "checkpoints" / "step-000005")
    alone = luffy("train", whole / "config.toml", "--run-dir", home / "alone", cwd=home, fresh=True)
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert_same_state(home / "alone", whole, "step-000004")


def test_a_complete_run_is_said_again_and_not_overwritten(home, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    assert luffy(*arguments(whole, home / "model", "--resume"), cwd=home).returncode == 0
    refused = luffy(*arguments(whole, home / "model"), cwd=home)
    assert (refused.returncode, "already holds a run; pass --resume" in refused.stderr) == (2, True)
    other = luffy(*arguments(whole, home / "model", "--resume", **STAGES | {"first.optim.lr": 0.1}), cwd=home)
    assert (other.returncode, "first holds a run with other settings (optim.lr)" in other.stderr) == (2, True)
    assert (whole / "metrics.jsonl").read_bytes() == before


def start(home: Path, run: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "luffy", *arguments(run, home / "model", "--resume", "auto", *more)]
    environment = os.environ | {"LUFFY_CACHE": str(home / "cache")}
    return subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for_step(stage: Path, process: subprocess.Popen) -> None:
    """Until the stage has one more step than it had."""

    def steps() -> int:
        return (stage / "metrics.jsonl").read_bytes().count(b"\n") if (stage / "metrics.jsonl").exists() else 0

    before, deadline = steps(), time.monotonic() + 200
    while steps() == before:
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def end(process: subprocess.Popen, number: signal.Signals) -> int:
    process.send_signal(number)
    process.communicate(timeout=200)
    return process.returncode


@pytest.mark.slow
def test_stopped_and_killed_in_either_stage_it_ends_the_same(home, whole):
    """Ctrl-C in the first stage, a kill in the first, a kill in the second: the same process goes on to it."""
    run = home / "killed"
    process = start(home, run)
    wait_for_step(run / "first", process)
    assert end(process, signal.SIGINT) == 130
    assert not (run / "first" / "result.json").exists()
    process = start(home, run)
    wait_for_step(run / "first", process)
    assert end(process, signal.SIGKILL) == -signal.SIGKILL
    assert not (run / "config.toml").exists()
    process = start(home, run)
    wait_for_step(run, process)
    assert end(process, signal.SIGKILL) == -signal.SIGKILL
    assert not (run / "result.json").exists()
    run_to_end(home, "killed", "--resume")
    assert_same_end(run, whole)


@pytest.mark.slow
def test_ranks_go_on_to_the_second_stage_and_survive_a_kill_in_it(home, whole):
    run, launch = home / "ranks", ["--nproc-per-node", "2", "--max-restarts", "1"]
    process = start(home, run, *launch)
    wait_for_step(run, process)
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True)
    ranks = [int(line.split()[0]) for line in listed.stdout.splitlines() if "-m luffy train" in line]
    os.kill(ranks[1], signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert b"was killed by SIGKILL" in err
    for ours, theirs in ((run / "first", whole / "first"), (run, whole)):
        losses = [[record["actor/loss"] for record in records(one)] for one in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert result(run)["first"]["checkpoint"] == "first/checkpoints/step-000005"


RECIPE = """
name = "two"
[optim]
lr = 1e-6
[objective]
name = "dr_grpo"
rows = 4
[first]
[first.objective]
name = "sft"
trace_filter = true
[first.optim]
lr = 5e-5
[first.data]
path = "traces.parquet"
"""


@pytest.fixture
def recipe(tmp_path) -> str:
    (tmp_path / "two.toml").write_text(RECIPE)
    return str(tmp_path / "two.toml")


def test_the_first_stage_is_the_recipe_with_its_own_keys_in_place(recipe):
    first, last = load_stages(recipe, ["--model.name", "m", "--optim.lr=2e-6", "--first.train.steps", "7"])
    assert (first.name, first.objective.name, first.objective.trace_filter) == ("two-first", "sft", True)
    assert (first.model.name, first.optim.lr, first.train.steps, first.data.path) == ("m", 5e-5, 7, "traces.parquet")
    assert (last.model.name, last.optim.lr, last.train.steps, last.data.path) == ("m", 2e-6, 500, None)
    assert (last.objective.name, last.objective.rows) == ("dr_grpo", 4)
    assert load_config(recipe) == load_stages(recipe)[-1]
    assert len(load_stages("quickstart")) == 1
    switched, _ = load_stages(recipe, ["--first.objective.name=luffy", "--first.objective.gamma=0.3"])
    assert (switched.objective.name, switched.objective.gamma) == ("luffy", 0.3)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--first.optim.lrr", "1"], ["first stage", "--optim.lrr", "did you mean --optim.lr?"]),
        (["--first.optim.lr", "-1"], ["first stage", "optim.lr", "greater than 0"]),
        (["--first.optim.lr"], ["first stage", "--optim.lr"]),
        (["--first.name", "x"], ["name cannot be set"]),
        (["--first.first.optim.lr", "1"], ["first cannot be set"]),
        (["--first.objective.name", "stf"], ["first stage", "'stf'", "did you mean sft?"]),
        (["--first.objective.rows", "4"], ["first stage", "--objective.rows"]),
        (["--rollout.engine=replay", "--rollout.replay=x"], ["replay", "one stage"]),
    ],
)
def test_a_mistake_in_the_first_stage_is_one_sentence_that_says_so(recipe, overrides, words):
    with pytest.raises(UserError) as error:
        load_stages(recipe, overrides)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("[first.optim]\nlr = 1.0\n", "objective.name must be set"),
        ("[first.objective]\nname = 'sft'\ntrace_filtr = true\n", "trace_filtr"),
        ("[first.objective]\nname = 'sft'\n[first.first.optim]\nlr = 1.0\n", "first cannot be set"),
        ("[first]\nname = 'x'\n[first.objective]\nname = 'sft'\n", "name cannot be set"),
        ("first = 3\n", "must be a table"),
        ("[first]\n", "objective.name must be set"),
    ],
)
def test_a_bad_table_is_one_sentence(table, words, tmp_path):
    (tmp_path / "mine.toml").write_text(table)
    with pytest.raises(UserError, match=words):
        load_stages(str(tmp_path / "mine.toml"))


def test_folders_of_other_runs_are_refused(recipe, tmp_path):
    stages = load_stages(recipe)
    run = RunFolder(tmp_path / "run")
    folder, config = due(run, stages, resume=False)
    assert (folder.path, config) == (tmp_path / "run" / "first", stages[0])
    run.first.open(stages[0])
    with pytest.raises(UserError, match="already holds a run; pass --resume"):
        due(run, stages, resume=False)
    with pytest.raises(UserError, match="holds the first stage of two"):
        due(run, load_stages("quickstart"), resume=True)
    asked = {"steps": stages[0].train.steps, "max_minutes": None}
    run.first.finish({"asked": asked, "checkpoint": "checkpoints/step-000500"})
    with pytest.raises(UserError, match="step-000500, from which the second stage begins, is gone"):
        due(run, stages, resume=True)
