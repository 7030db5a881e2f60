"""Every objective trains a small model for a while and improves on the criterion that its docstring names.

The model, of `bench.small_model`, is taught in a minute to add digits, and to guess more often than to work it
out. Each objective then has its own defaults, and what is its own has to have happened, too. It prints a table:

    OMP_NUM_THREADS=1 python -m pytest tests/test_criteria.py -m slow
"""

import json
import re
import sys
from statistics import fmean

import pytest

from bench.small_model import make_model
from luffy import distributed
from luffy.config import MeshConfig, RolloutConfig
from luffy.config_file import load_config
from luffy.objectives import KNOWN, find, options_of
from luffy.problems import ProblemSpec, rows
from luffy.rollout.vllm_engine import VllmEngine
from luffy.run_folder import RunFolder
from luffy.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS, FEW, LEAST = 80, 8, 0.03
FAMILY = {"digit_sum": {"digits": 2, "ood_digits": 3}}
COMMON = {
    "model.dtype": "float32",
    "data.problems.families": json.dumps(FAMILY),
    "data.problems.train": 400,
    "data.problems.heldout": 200,
    "data.problems.ood": 1,
    "data.problems.teachers": '["arrows"]',
    "data.max_prompt_tokens": 64,
    "rollout.temperature": 1.0,
    "rollout.max_tokens": 20,
    "eval.max_tokens": 20,
    "eval.temperature": 1.0,
    "eval.every": 0,
    "checkpoint.every": 0,
    "train.max_minutes": 30,
    "train.tokens_per_micro": 8192,
    "optim.schedule": "constant",
}
TEACHING = {
    "objective.name": "sft",
    "train.prompts_per_step": 96,
    "train.steps": 250,
    "optim.lr": 4e-3,
    "optim.warmup_steps": 10,
    "optim.schedule": "linear",
}
LEARNING = {"train.steps": STEPS, "train.prompts_per_step": 12, "optim.lr": 1e-4}
SMALL = {
    "exgrpo": {"objective.start": 0.05},
    "relift": {"objective.demonstrations": 8},
    "sort": {"objective.plan_tokens": 32},
    "ppo": {"objective.value_lr": 1e-3},
}
"""What so short a run needs to come to what a method is about."""
IMITATES = ("luffy", "rl_sft", "hpt", "chord", "srft", "relift", "sort", "sft", "uft", "prefix_rft")
HAPPENS = {
    **dict.fromkeys(IMITATES, "actor/off_policy_prob"),
    "bread": "batch/tried_again",
    "exgrpo": "replay/answers",
    "ppo": "critic/vf_loss",
    "prime": "reward_model/grad_norm",
}
"""Metric above 0 in some step of a method that does what is its own."""


def corpus() -> list[dict]:
    """Worked out, and guessed."""
    found = list(rows(ProblemSpec(families=FAMILY, train=1500, teachers=["arrows"]), "train"))
    for row in rows(ProblemSpec(families=FAMILY, train=2500, teachers=["arrows"], wrong=1.0, seed=1), "train"):
        [turn] = row["target"]
        found.append(row | {"target": [turn | {"content": turn["content"].split(" -> ")[-1]}]})
    return found


class Taught:
    """An engine, and the model that all runs begin with."""

    def __init__(self, folder) -> None:
        self.folder, made = folder, corpus()
        texts = [turn["content"] for row in made[:300] for turn in (row["prompt"][-1], row["target"][0])]
        make_model(folder / "blank", texts, seed=0, hidden=64, blocks=2)
        (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        distributed.start(MeshConfig())  # not a run's, so that the engine outlives it
        blank = str(folder / "blank")
        self.engine = VllmEngine(blank, RolloutConfig(), dtype="float32", eos_token_id=2, max_model_len=160)
        result, _ = self.run("teaching", TEACHING | {"data.path": str(folder / "corpus.jsonl"), "model.name": blank})
        self.model = str(folder / "teaching" / result["checkpoint"])

    def run(self, name: str, options: dict) -> tuple[dict, list[dict]]:
        config = load_config("quickstart", [f"--{key}={value}" for key, value in (COMMON | options).items()])
        at = RunFolder(self.folder / name)
        result = train(config, at, engine=self.engine)
        return result, [json.loads(line) for line in at.metrics.read_text().splitlines()]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("criteria")
        patch.setenv("LUFFY_CACHE", str(folder / "cache"))
        found = Taught(folder)
        yield found
        found.engine.close()
        distributed.close()


@pytest.fixture(scope="module")
def table(pytestconfig):
    """Lines for the end of the output."""
    lines: list[str] = []
    yield lines
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n" + "\n".join(["objective        criterion, first -> last", *lines]))


def criterion(name: str) -> str:
    doc = " ".join(sys.modules[find(name).__module__].__doc__.split())
    return re.search(r"Criterion: (.*?)\.", doc).group(1)


def known(steps: list[dict], key: str) -> list[float]:
    return [step[key] for step in steps if step.get(key) is not None]


def ends(values: list[float]) -> tuple[float, float]:
    return fmean(values[:FEW]), fmean(values[-FEW:])


def options_for(taught: Taught, name: str) -> dict:
    options = LEARNING | {"objective.name": name, "model.name": taught.model} | SMALL.get(name, {})
    defaults = options_of(name).model_validate({})
    own = {key: getattr(defaults, key) for key in ("normalizer", "entropy_coef") if hasattr(defaults, key)}
    if isinstance(own.get("normalizer"), float):
        own["normalizer"] = 1440.0  # a published one is for 512 long answers: the entropy bonus would be all there is
    options |= {f"objective.{key}": value for key, value in own.items()}  # not the recipe's
    options |= {"objective.rows": 6} if hasattr(defaults, "rows") else {"train.prompts_per_step": 48}
    return options


@pytest.mark.parametrize("name", KNOWN)
def test_it_improves(taught, table, name):
    result, steps = taught.run(name, options_for(taught, name))
    assert len(steps) == STEPS
    said, found = criterion(name), {}
    if "mean reward of rollouts rises" in said:  # on problems that it is not trained on
        found["reward"] = (result["before"][0]["accuracy"], result["after"][0]["accuracy"])
    if "probability of traces" in said:
        found["p(trace)"] = ends(known(steps, "actor/off_policy_prob"))
    if "fewer tries" in said:
        found["tries"] = tuple(-x for x in ends(known(steps, "batch/tried_again")))
    assert found, f"{name} names no criterion that is known here: {said}"
    table.append(f"{name:16} " + "  ".join(f"{what} {a:.3f} -> {b:.3f}" for what, (a, b) in found.items()))
    assert all(last > first for first, last in found.values()), table[-1]
    if "reward" in found:
        assert found["reward"][1] - found["reward"][0] > LEAST, "that little could be chance"
    if name in HAPPENS:
        assert any(value > 0 for value in known(steps, HAPPENS[name])), f"{name} did not do what is its own"
