"""The whole loop: a tiny random model, real vLLM, real verifier processes, real files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_metrics_table import is_documented
from tiny import luffy

from luffy.reporting.charts import CHARTS

OPTIONS = {
    "data.problems.train": 24,
    "data.problems.heldout": 6,
    "data.problems.ood": 3,
    "data.problems.missing": 0.25,
    "data.problems.wrong": 0.3,
    "rollout.max_tokens": 8,
    "rollout.kv_cache_gib": 0.25,
    "model.dtype": "float32",
    "optim.lr": 0.01,
    "optim.warmup_steps": 1,  # so that the falling rate matters from the second update on
    "train.prompts_per_step": 4,
    "train.updates_per_step": 2,
    "objective.rows": 4,
    "objective.entropy_coef": 0.001,  # every row is live, whatever its reward
    "eval.every": 2,
    "eval.every_limit": 3,
    "checkpoint.every": 2,
    "checkpoint.keep": 9,
}


def arguments(run: Path, model: Path, *more: str, **options) -> list[str]:
    """An option of None is left out."""
    flat = OPTIONS | {"model.name": model} | {key.replace("__", "."): value for key, value in options.items()}
    flat = {key: value for key, value in flat.items() if value is not None}
    return ["train", "quickstart", "--run-dir", str(run), *more, *[f"--{k}={v}" for k, v in flat.items()]]


def records(run: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(("timing_", "perf/"))} for row in rows]


def state(run: Path, step: str) -> dict[str, torch.Tensor]:
    """Weights and moments of a checkpoint that one rank wrote."""
    folder = run / "checkpoints" / step
    return {
        f"{file.relative_to(folder)} {name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_state(a: Path, b: Path, step: str) -> None:
    """Bit for bit."""
    one, other = state(a, step), state(b, step)
    assert one.keys() == other.keys()
    assert any("exp_avg_sq" in name for name in one)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def whole(home) -> Path:
    """Four steps in one go."""
    done = luffy(*arguments(home / "whole", home / "model", train__steps=4), cwd=home, fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held-out problems" in done.stdout
    return home / "whole"


@pytest.fixture(scope="module")
def halves(home) -> Path:
    """One step, by a time limit, then the other three."""
    for minutes, more, last in ((1e-6, [], 1), (1000, ["--resume"], 4)):
        options = {"train__steps": 4, "train__max_minutes": minutes}
        done = luffy(*arguments(home / "halves", home / "model", *more, **options), cwd=home, fresh=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert records(home / "halves")[-1]["step"] == last
        torn = home / "halves" / "checkpoints" / ".step-000009.tmp"  # as a kill while saving leaves it
        if more:
            assert not torn.exists()
        else:
            torn.mkdir()
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
    assert [r["num_problems"] for r in records(whole, "evals")] == [6, 3, 3, 6, 3]
    for name in ("config.toml", "environment.json", "result.json", "curves.png"):
        assert (whole / name).stat().st_size > 0, name
    assert list((whole / "tensorboard").iterdir())
    assert json.loads((whole / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    samples = [json.loads(line) for line in (whole / "samples" / "heldout-step-000004.jsonl").read_text().splitlines()]
    assert len(samples) == 6
    assert {"question", "response", "answer", "reward"} <= samples[0].keys()


def test_what_it_logs_is_documented_and_drawn(whole):
    logged = {key for r in records(whole) for key in r}
    assert [key for key in logged if not is_documented(key)] == []
    assert {key for chart in CHARTS for _, key in chart.lines} <= logged
    done = luffy("report", whole, cwd=whole)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Held-out accuracy" in (whole / "report.html").read_text()


def test_groups_hold_rollouts_and_verified_traces(whole):
    for r in records(whole):
        assert r["batch/rows"] == 16  # 4 prompts x 4 rows, with a trace or without
        traces = 4 - r["batch/groups_without_trace"]
        assert r["batch/avg_prefix_ratio"] == traces / 16
        if traces:
            assert 0 < r["actor/off_policy_prob"] < 1
        assert r["batch/on_solved"] == 0.0  # a random model solves nothing
        assert r["actor/updates"] == 2
        assert abs(r["actor/ppo_kl"]) > 1e-6  # the second update still knows the policy that sampled
    solved = [r["batch/off_solved"] for r in records(whole) if r["batch/off_solved"] is not None]
    assert 0 < sum(solved) / len(solved) < 1  # traces are graded, and some are wrong
    assert sum(r["batch/groups_without_trace"] for r in records(whole)) > 0


def test_the_engine_samples_from_the_trainers_own_policy(whole):
    # fp32 on both sides: the only gap is rounding; stale weights would show from step 2 on, for lr is large
    assert max(r["rollout/logp_gap_max"] for r in records(whole)) < 1e-3


def test_two_runs_of_one_seed_are_identical(whole, halves):
    assert without_times(records(whole))[:3] == without_times(records(halves))[:3]
    assert len({r["actor/lr"] for r in records(whole)}) > 2


def test_resuming_is_the_same_as_never_stopping(whole, halves):
    assert without_times(records(whole)) == without_times(records(halves))
    assert_same_state(whole, halves, "step-000004")


def test_a_finished_run_is_printed_again_and_not_redone(whole, home):
    before = (whole / "metrics.jsonl").read_bytes()
    done = luffy(*arguments(whole, home / "model", "--resume", train__steps=4), cwd=home)
    assert done.returncode == 0
    assert "held-out problems" in done.stdout
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_what_a_run_was_judged_by_before_it_was_stopped_is_not_asked_again(whole, home):
    shutil.copytree(whole, run := home / "judged")
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    before = (run / "evals.jsonl").read_bytes()
    done = luffy(*arguments(run, home / "model", "--resume", train__steps=4), cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (run / "evals.jsonl").read_bytes() == before
    assert json.loads((run / "result.json").read_text()) == result


def test_a_folder_with_a_run_is_refused(whole, home):
    done = luffy(*arguments(whole, home / "model", train__steps=4), cwd=home)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "already holds a run" in done.stderr
    other = luffy(*arguments(whole, home / "model", "--resume", train__steps=4, optim__lr=0.5), cwd=home)
    assert other.returncode == 2
    assert "optim.lr" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dr_grpo", "sft"])
def test_baselines_run_through_the_same_loop(home, objective):
    run = home / objective
    options = {"objective__name": objective, "train__steps": 3}
    if objective == "sft":
        options |= {"objective__rows": None, "objective__entropy_coef": None}
    done = luffy(*arguments(run, home / "model", **options), cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = records(run)
    r = rows[0]
    if objective == "sft":
        assert r["batch/rows"] == 4 - r["batch/groups_without_trace"]
        losses = [r["actor/off_pg_loss"] for r in rows]  # mean negative log-likelihood, log 259 at first
        assert losses[0] > 5
        assert losses[-1] < losses[0] - 1
        assert r["actor/on_policy_prob"] is None
    else:
        assert r["batch/rows"] == 16
        assert r["batch/avg_prefix_ratio"] == 0.0


@pytest.mark.slow
def test_evaluation_of_a_run(whole, home):
    [data] = (home / "cache" / "problems").glob("*/ood.parquet")
    out = home / "answers"
    options = ["--limit", "3", "--max-tokens", "8", "--out", out]
    done = luffy("eval", "--model", whole, "--data", data, *options, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    [answers] = out.glob("*/*.jsonl")
    assert len(answers.read_text().splitlines()) == 1 + 3
    [model] = json.loads((out / "summary.json").read_text())["models"].values()
    assert model["benchmarks"][0]["grader"] == "number-1"  # the run's


@pytest.mark.slow
def test_generation_from_a_run(whole, home):
    done = luffy("generate", "2+2?", "--model", whole, "--max-tokens", "4", cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]


def test_problems_of_ones_own_without_a_held_out_set(whole, home):
    [data] = (home / "cache" / "problems").glob("*/train.parquet")
    options = {"data__path": data, "train__steps": 2, "eval__every": 1}
    done = luffy(*arguments(home / "own", home / "model", **options), cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no held-out problems" in done.stderr


def test_ctrl_c_saves_and_the_run_goes_on(home):
    run, options = home / "stopped", {"checkpoint__every": 0, "optim__schedule": "constant"}
    command = [sys.executable, "-m", "luffy", *arguments(run, home / "model", train__steps=500, **options)]
    environment = os.environ | {"LUFFY_CACHE": str(home / "cache")}
    process = subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not ((run / "metrics.jsonl").exists() and records(run)):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err[-3000:]
    done = records(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{done:06d}").is_dir()
    assert not (run / "result.json").exists()
    again = luffy(*arguments(run, home / "model", "--resume", train__steps=done + 1, **options), cwd=home)
    assert again.returncode == 0, again.stderr[-3000:]
    assert [r["step"] for r in records(run)] == list(range(1, done + 2))


def test_the_gsm8k_recipe_runs_on_rows_of_that_schema(home):
    worked = "Two and <<2+3=5>>three make 5.\n#### 5"
    rows = [{"question": f"{n}: how many are 2 and 3?", "answer": worked} for n in range(8)]
    rows.append({"question": "A long one?", "answer": "so " * 400 + "\n#### 1"})
    (home / "gsm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--train.steps=2", "--rollout.max_tokens=8", "--model.gradient_checkpointing=true"]
    command = ["train", "gsm8k-smoke", "--run-dir", home / "gsm", "--model.name", home / "model"]
    done = luffy(*command, "--data.path", home / "gsm.jsonl", *options, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kept 8 of 9 traces: 1 too long" in done.stderr
    last = records(home / "gsm")[-1]
    assert last["step"] == 2
    assert last["batch/off_solved"] == 1.0  # the human solution is the trace, and it verifies
    assert last["actor/bad_updates"] == 0
