"""The whole loop: a tiny random model, real vLLM, real verifier processes, real files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, luffy, make_model

OPTIONS = {
    "data.problems.train": 24,
    "data.problems.heldout": 6,
    "data.problems.ood": 3,
    "data.problems.missing": 0.25,
    "rollout.max_tokens": 8,
    "rollout.memory_fraction": 0.05,
    "model.dtype": "float32",
    "optim.lr": 0.01,
    "train.prompts_per_step": 4,
    "train.updates_per_step": 2,
    "objective.rows": 4,
    "eval.every": 2,
    "checkpoint.every": 2,
    "checkpoint.keep": 9,
}


def arguments(run: Path, model: Path, *more: str, **options) -> list[str]:
    flat = OPTIONS | {"model.name": model} | {key.replace("__", "."): value for key, value in options.items()}
    return ["train", "quickstart", "--run-dir", str(run), *more, *[f"--{k}={v}" for k, v in flat.items()]]


def records(run: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))} for row in rows]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    make_model(home / "model")
    return home


@pytest.fixture(scope="module")
def whole(home) -> Path:
    """Four steps in one go."""
    done = luffy(*arguments(home / "whole", home / "model", train__steps=4), cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held-out problems" in done.stdout
    return home / "whole"


@pytest.fixture(scope="module")
def halves(home) -> Path:
    """Two steps, then two more."""
    for steps, more in ((2, []), (4, ["--resume"])):
        # the run is complete at its own `train.steps`: to go on, ask for more
        done = luffy(*arguments(home / "halves", home / "model", *more, train__steps=steps), cwd=home)
        assert done.returncode == 0, done.stderr[-3000:]
    return home / "halves"


def test_a_run_leaves_everything_behind(whole):
    assert [r["step"] for r in records(whole)] == [1, 2, 3, 4]
    assert [(r["step"], r["name"]) for r in records(whole, "evals")] == [
        (0, "heldout"),
        (0, "ood"),
        (2, "heldout"),
        (4, "heldout"),
        (4, "ood"),
    ]
    for name in ("config.toml", "environment.json", "result.json", "curves.png"):
        assert (whole / name).stat().st_size > 0, name
    assert list((whole / "tensorboard").iterdir())
    assert json.loads((whole / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    samples = [json.loads(line) for line in (whole / "samples" / "heldout-step-000004.jsonl").read_text().splitlines()]
    assert len(samples) == 6
    assert {"question", "response", "answer", "reward"} <= samples[0].keys()


def test_groups_hold_rollouts_and_verified_traces(whole):
    for r in records(whole):
        assert r["batch/rows"] == 16  # 4 prompts x 4 rows, with a trace or without
        traces = 4 - r["batch/groups_without_trace"]
        assert r["batch/avg_prefix_ratio"] == traces / 16
        if traces:
            assert r["batch/off_solved"] == 1.0  # the generator's traces are right, and were graded
            assert 0 < r["actor/off_policy_prob"] < 1
        assert r["batch/on_solved"] == 0.0  # a random model solves nothing
        assert r["actor/updates"] == 2
    assert sum(r["batch/groups_without_trace"] for r in records(whole)) > 0


def test_training_raises_the_probability_of_traces(whole):
    probabilities = [r["actor/off_policy_prob"] for r in records(whole) if r["actor/off_policy_prob"]]
    assert probabilities[-1] > 1.5 * probabilities[0]


def test_the_engine_samples_from_the_trainers_own_policy(whole):
    # fp32 on both sides: the only gap is rounding; stale weights would show from step 2 on, for lr is large
    assert max(r["rollout/logp_gap_max"] for r in records(whole)) < 1e-3


def test_two_runs_of_one_seed_are_identical(whole, halves):
    assert without_times(records(whole))[:2] == without_times(records(halves))[:2]


def test_resuming_is_the_same_as_never_stopping(whole, halves):
    assert without_times(records(whole)) == without_times(records(halves))
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(run / "checkpoints" / "step-000004" / name) for run in (whole, halves))
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key


def test_a_finished_run_is_printed_again_and_not_redone(whole, home):
    before = (whole / "metrics.jsonl").read_bytes()
    done = luffy(*arguments(whole, home / "model", "--resume", train__steps=4), cwd=home)
    assert done.returncode == 0
    assert "held-out problems" in done.stdout
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_a_folder_with_a_run_is_refused(whole, home):
    done = luffy(*arguments(whole, home / "model", train__steps=4), cwd=home)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "already holds a run" in done.stderr
    other = luffy(*arguments(whole, home / "model", "--resume", train__steps=9, optim__lr=0.5), cwd=home)
    assert other.returncode == 2
    assert "optim.lr" in other.stderr


@pytest.mark.parametrize("objective", ["grpo", "sft"])
def test_baselines_run_through_the_same_loop(home, objective):
    run = home / objective
    options = {"objective__name": objective, "train__steps": 1, "objective__entropy_coef": 0.01}
    done = luffy(*arguments(run, home / "model", **options), cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    [r] = records(run)
    if objective == "sft":
        assert r["batch/rows"] == 4 - r["batch/groups_without_trace"]
        assert r["actor/off_pg_loss"] > 1  # the mean negative log-likelihood of a random model
        assert r["actor/on_policy_prob"] is None
    else:
        assert r["batch/rows"] == 16
        assert r["batch/avg_prefix_ratio"] == 0.0


def test_evaluation_and_generation_of_a_run(whole, home):
    data = ROOT.parent / "shared" / "data" / "luffy_valid.parquet"
    if not data.exists():
        pytest.skip("shared/data is not here: no competition problems to evaluate on")
    out = home / "answers.jsonl"
    arguments = ["eval", "--model", whole, "--data", data, "--limit", "3", "--max-tokens", "8", "--out", out]
    done = luffy(*arguments, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(out.read_text().splitlines()) == 3
    asked = luffy("generate", "What is 2+2?", "--model", whole, "--max-tokens", "4", cwd=home)
    assert asked.returncode == 0, asked.stderr[-3000:]
