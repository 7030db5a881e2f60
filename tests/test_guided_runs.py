"""Objectives that change what a step is made of - prefixes, tries, updates of their own - in real runs of a tiny model,
which is always wrong. One engine serves all runs."""

import json
import math

import pytest
from safetensors.torch import load_file
from tiny import make_model

from luffy import distributed
from luffy.config import MeshConfig, RolloutConfig
from luffy.config_file import load_config
from luffy.rollout.vllm_engine import VllmEngine
from luffy.run_folder import RunFolder
from luffy.train import train

STEPS = 3
COMMON = {
    "model.dtype": "float32",
    "data.problems.train": 16,
    "data.problems.heldout": 2,
    "data.problems.ood": 2,
    "data.max_prompt_tokens": 128,
    "data.max_trace_tokens": 96,
    "rollout.max_tokens": 12,
    "eval.max_tokens": 8,
    "eval.every": 0,
    "objective.rows": 3,
    "train.prompts_per_step": 4,
    "train.steps": STEPS,
    "train.max_minutes": 10,
    "checkpoint.every": 0,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder, engine) of a model."""
    folder = tmp_path_factory.mktemp("tiny")
    path = str(make_model(folder / "model"))
    distributed.start(MeshConfig())  # not a run's, so that the engine outlives it
    engine = VllmEngine(path, RolloutConfig(), dtype="float32", eos_token_id=2, max_model_len=400)
    yield folder, engine
    engine.close()
    distributed.close()


def run(tiny, monkeypatch, name: str, **options) -> tuple[list[dict], RunFolder]:
    folder, engine = tiny
    monkeypatch.setenv("LUFFY_CACHE", str(folder / "cache"))
    flags = COMMON | {"model.name": str(folder / "model"), "objective.name": name} | options
    config = load_config("quickstart", [f"--{key}={value}" for key, value in flags.items()])
    at = RunFolder(folder / "-".join([name, *map(str, options.values())]).replace("/", "_"))
    result = train(config, at, engine=engine)
    assert result["steps"] == config.train.steps
    steps = [json.loads(line) for line in at.metrics.read_text().splitlines()]
    assert all(math.isfinite(step["actor/loss"]) for step in steps if step["actor/updates"])
    # the engine had the run's weights, whatever run it served before
    assert max(step["rollout/logp_gap_mean"] or 0.0 for step in steps) < 1e-4
    return steps, at


def test_bread_tries_again_and_says_how_often(tiny, monkeypatch):
    steps, _ = run(tiny, monkeypatch, "bread", **{"objective.tries": 2})
    assert [step["batch/tried_again"] for step in steps] == [2 * 4] * STEPS
    assert all(step["response_length/max"] <= 12 for step in steps)


@pytest.mark.parametrize("name", ["prefix_rft", "uft"])
def test_rollouts_with_a_prefix(tiny, monkeypatch, name):
    steps, _ = run(tiny, monkeypatch, name)
    assert all(step["batch/rows"] == 12 for step in steps)
    assert steps[0]["response_length/max"] == 12  # eleven given, one sampled
    if name == "uft":  # its hints' likelihood is learned, and no longer once there are none
        assert [step["actor/updates"] for step in steps] == [1, 1, 0]
        assert steps[0]["actor/off_policy_prob"] > 0


def test_relift_imitates_what_it_cannot_solve_and_remembers_what_waits(tiny, monkeypatch):
    options = {"objective.demonstrations": 6, "optim.schedule": "linear", "optim.warmup_steps": 0}
    steps, at = run(tiny, monkeypatch, "relift", **options)
    assert [step["relift/buffer"] for step in steps] == [4, 2, 0]
    assert [step["actor/updates"] for step in steps] == [0, 1, 1]
    assert steps[1]["actor/lr"] == steps[2]["actor/lr"], "extra updates are none of the schedule's"
    assert all(step["batch/rows"] == 12 and step["batch/avg_prefix_ratio"] == 0 for step in steps)
    [saved] = at.checkpoints.glob("step-*/trainer/objective.safetensors")
    assert load_file(saved)["buffer"].shape == (0, 2)


def test_sort_asks_the_engine_what_a_plan_makes_likely(tiny, monkeypatch):
    asked = []
    _, engine = tiny
    score = engine.score
    monkeypatch.setattr(engine, "score", lambda sequences: asked.append(sequences) or score(sequences))
    steps, _ = run(tiny, monkeypatch, "sort", **{"objective.plan_tokens": 40})
    assert [len(sequences) for sequences in asked] == [4] * STEPS
    assert all(step["actor/updates"] == 1 for step in steps)


@pytest.mark.parametrize("choice", ["likely", "unlikely"])
def test_traces_longer_than_answers_are_scored(tiny, monkeypatch, choice):
    steps, _ = run(tiny, monkeypatch, "luffy", **{"objective.trace_choice": choice})
    assert all(step["on_off_metrics/off_response_length_mean"] > 12 for step in steps)
