"""A run survives: killed at any moment it goes on bit for bit, and on another number of ranks with the same data."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_train import arguments, assert_same_state, records, without_times
from tiny import luffy

from luffy import checkpoint, train
from luffy.data import Example, Problem
from luffy.distributed import World
from luffy.evaluate import Evaluation, digest_of
from luffy.interrupt import StopOnInterrupt, Stopped
from luffy.run_folder import RunFolder

STEPS, KILLS = 10, 5
OFTEN = {"train__steps": STEPS, "checkpoint__every": 1, "eval__every": 0}


def run_to_end(home: Path, name: str, *more: str, **options) -> Path:
    done = luffy(*arguments(home / name, home / "model", *more, **options), cwd=home, timeout=500, fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return home / name


@pytest.fixture(scope="module")
def whole(home) -> Path:
    return run_to_end(home, "whole", **OFTEN)


def start(home: Path, run: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "luffy", *arguments(run, home / "model", "--resume", "auto", **OFTEN)]
    environment = os.environ | {"LUFFY_CACHE": str(home / "cache")}
    return subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def steps_of(run: Path) -> int:
    return (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0


def is_writing(run: Path, before: int) -> bool:
    return steps_of(run) > before and bool(list((run / "checkpoints").glob(".step-*.tmp")))


def wait_for(what, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not what():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError((process.stderr.read() if process.poll() is not None else b"too slow")[-3000:])
        time.sleep(0.002)


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_nothing(home, whole):
    """Twice while a checkpoint is being written, else anywhere after at least one more step."""
    run, rng, torn = home / "killed", random.Random(0), 0
    for kill in range(KILLS):
        process, before = start(home, run), steps_of(run)
        if kill % 2 == 0:  # the folder that is being written appears under a name of its own
            wait_for(partial(is_writing, run, before), process)
        else:
            wait_for(lambda before=before: steps_of(run) > before, process)
            time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        torn += bool(list((run / "checkpoints").glob(".step-*.tmp")))
        assert not (run / "result.json").exists(), "it ended before it could be killed: take more steps"
    assert torn >= 2
    run_to_end(home, "killed", "--resume", "auto", **OFTEN)
    assert without_times(records(run)) == without_times(records(whole))
    assert_same_state(run, whole, f"step-{STEPS:06d}")
    assert not list((run / "checkpoints").glob(".*"))


RANKS = {"train__steps": 4, "checkpoint__every": 2, "optim__schedule": "constant"}
# Of every rank count: what depends on which problems were seen and what was sampled, to the last bit.
EXACT = ("batch/", "on_off_metrics/", "critic/", "response_length/", "prompt_length/", "actor/updates", "actor/lr")


@pytest.fixture(scope="module")
def alone(home) -> Path:
    return run_to_end(home, "alone", **RANKS)


@pytest.fixture(scope="module")
def two(home) -> Path:
    return run_to_end(home, "two", "--nproc-per-node", "2", **RANKS)


def assert_same_curve(run: Path, other: Path) -> None:
    """The same data and samples; losses and norms to fp32's rounding."""
    ours, theirs = records(run), records(other)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == [1, 2, 3, 4]
    for a, b in zip(ours, theirs, strict=True):
        assert {k: v for k, v in a.items() if k.startswith(EXACT)} == {
            k: v for k, v in b.items() if k.startswith(EXACT)
        }
        for name in ("actor/loss", "actor/grad_norm", "actor/entropy_loss", "actor/off_policy_prob"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), (a["step"], name)


@pytest.mark.slow
def test_two_ranks_follow_the_curve_of_one(alone, two):
    assert_same_curve(two, alone)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_run_of_two_ranks_goes_on_with_other_numbers(home, alone, two, ranks):
    run = home / f"on-{ranks}"
    shutil.copytree(two, run)
    shutil.rmtree(run / "checkpoints" / "step-000004")
    (run / "result.json").unlink()
    launch = ["--nproc-per-node", str(ranks)] if ranks > 1 else []
    run_to_end(home, run.name, "--resume", *launch, **RANKS)
    assert_same_curve(run, alone)


@pytest.mark.slow
def test_many_ranks_survive_a_kill_and_a_pre_emption(home, two):
    """A rank is killed: all start again from the newest checkpoint. SIGTERM: the step is finished and saved, exit 0."""
    run, options = home / "survivor", {**RANKS, "checkpoint__every": 1}
    launch = ["--nproc-per-node", "2", "--max-restarts", "1", "--resume", "auto"]
    environment = os.environ | {"LUFFY_CACHE": str(home / "cache")}

    def job() -> subprocess.Popen:
        command = [sys.executable, "-m", "luffy", *arguments(run, home / "model", *launch, **options)]
        return subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    process = job()
    wait_for(lambda: checkpoint.latest(run / "checkpoints"), process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    # the ranks of the second start write step 2 or later, then all are told to end
    seen = steps_of(run)
    wait_for(lambda: steps_of(run) > seen, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    assert b"was killed by SIGKILL" in err
    if not (run / "result.json").exists():
        run_to_end(home, run.name, *launch, **options)
    assert_same_curve(run, two)


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Process ids of a launcher's ranks."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "-m luffy train" in line]


@pytest.mark.slow
def test_the_best_checkpoint_by_a_validation_set_stays(home):
    [data] = (home / "cache" / "problems").glob("*/train.parquet")
    options = {"train__steps": 3, "checkpoint__every": 1, "checkpoint__keep": 1, "eval__every": 1}
    run = run_to_end(home, "validated", **options, eval__validation=data, eval__every_limit=3, eval__overlap="warn")
    assert [r["name"] for r in records(run, "evals")].count("validation") == 3
    result = json.loads((run / "result.json").read_text())
    assert result["checkpoint"] == "checkpoints/step-000003"
    best = result["best"]
    scores = {r["step"]: r["accuracy"] for r in records(run, "evals") if r["name"] == "validation"}
    assert best["accuracy"] == max(scores.values()) == scores[best["step"]]
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {"step-000003", Path(best["checkpoint"]).name}


ALONE = {"rank": 0, "size": 1} | dict.fromkeys(("device", "store", "params", "data"))


def test_a_run_that_is_stopped_between_two_sets_keeps_the_first(tmp_path, monkeypatch):
    judged = []

    def evaluate_set(t, name, examples, step):
        judged.append(name)
        found = Evaluation(
            name=name, num_problems=len(examples), accuracy=0.5, interval=(0.2, 0.8), mean_tokens=9.0, truncated=0.0,
            timeouts=0,
        )  # fmt: skip
        with t.run.evals.open("a") as file:
            file.write(json.dumps({"step": step, "problems": digest_of(name, examples)} | found.record()) + "\n")
        t.stop.asked = True
        return found

    monkeypatch.setattr(train, "evaluate_set", evaluate_set)
    config = SimpleNamespace(eval=SimpleNamespace(limit=2))
    one, two, three = (Example(Problem(str(n), "", (), "1"), (n,), ()) for n in range(3))
    heldout = {"a": [one, two, three], "b": [one, two]}
    trainer = SimpleNamespace(config=config, run=RunFolder(tmp_path), heldout=heldout, world=World(**ALONE))
    trainer.stop = StopOnInterrupt()
    with pytest.raises(Stopped):
        train.evaluate_all(trainer, 4)
    assert judged == ["a"]
    trainer.stop = StopOnInterrupt()
    assert [record["name"] for record in train.evaluate_all(trainer, 4)] == ["a", "b"]
    assert judged == ["a", "b"], "and asked to stop in the last, it is done"
    assert [record["num_problems"] for record in train.evaluate_all(trainer, 4)] == [2, 2]
    assert judged == ["a", "b"]
    heldout["a"] = [one, three]
    trainer.stop = StopOnInterrupt()
    train.evaluate_all(trainer, 4)
    assert judged == ["a", "b", "a"], "of other problems it is another set"


@pytest.mark.slow
def test_damaged_checkpoints_are_set_aside_and_never_a_fresh_start(home, two):
    run = home / "damaged"
    shutil.copytree(two, run)
    (run / "result.json").unlink()
    flip(run / "checkpoints" / "step-000004" / "model.safetensors")
    done = luffy(*arguments(run, home / "model", "--resume", **RANKS | {"checkpoint__keep": 1}), cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "called damaged-step-000004 from now on" in done.stderr
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-000004", "damaged-step-000004"}
    assert_same_curve(run, two)

    (run / "result.json").unlink()
    flip(run / "checkpoints" / "step-000004" / "model.safetensors")
    before = (run / "metrics.jsonl").read_bytes()
    refused = luffy(*arguments(run, home / "model", "--resume", **RANKS), cwd=home)
    assert refused.returncode == 2
    assert "none of the checkpoints" in refused.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


def flip(file: Path) -> None:
    """Another byte, the same size."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
