"""A run survives: killed at any moment it goes on bit for bit, and on another number of ranks with the same data."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import arguments, assert_same_state, records, without_times
from tiny import luffy, make_model

STEPS, KILLS = 10, 5
OFTEN = {"train__steps": STEPS, "checkpoint__every": 1, "eval__every": 0}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    make_model(home / "model")
    return home


def run_to_end(home: Path, name: str, *more: str, **options) -> Path:
    done = luffy(*arguments(home / name, home / "model", *more, **options), cwd=home, timeout=500)
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


def wait_for(what, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not what():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError((process.stderr.read() if process.poll() is not None else b"too slow")[-3000:])
        time.sleep(0.002)


def test_kill_9_at_random_moments_changes_nothing(home, whole):
    """Twice while a checkpoint is being written, else anywhere after at least one more step."""
    run, rng, torn = home / "killed", random.Random(0), 0
    for kill in range(KILLS):
        process, before = start(home, run), steps_of(run)
        if kill % 2 == 0:  # the folder that is being written appears under a name of its own
            wait_for(
                lambda before=before: steps_of(run) > before and list((run / "checkpoints").glob(".step-*.tmp")),
                process,
            )
            torn += 1
        else:
            wait_for(lambda before=before: steps_of(run) > before, process)
            time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
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


def test_two_ranks_follow_the_curve_of_one(alone, two):
    assert_same_curve(two, alone)


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_run_of_two_ranks_goes_on_with_other_numbers(home, alone, two, ranks):
    run = home / f"on-{ranks}"
    shutil.copytree(two, run)
    shutil.rmtree(run / "checkpoints" / "step-000004")
    (run / "result.json").unlink()
    launch = ["--nproc-per-node", str(ranks)] if ranks > 1 else []
    run_to_end(home, run.name, "--resume", *launch, **RANKS)
    assert_same_curve(run, alone)
