"""Runs that were made to fail: the report's first warning names the cause. The quickstart's model, minutes each."""

import subprocess
import sys
from pathlib import Path

import pytest

from luffy.reporting.rules import FAR, findings
from luffy.reporting.runs import load
from luffy.train import MOST_GAP

SMALL = ["--train.steps", "6", "--eval.every", "0", "--data.problems.heldout", "32", "--data.problems.ood", "8"]
LARGE = "updates that are too large"
VERIFIER = "a verifier that turns down verified traces"
FROZEN = "a sampler whose weights fall behind"
TEMPLATE = "prompts in a form that the model does not know"
COMMAND = "from luffy.cli import main; import sys; sys.exit(main())"
NO_SYNC = """
from luffy.rollout.vllm_engine import VllmEngine

def forget(engine, policy, dtype, version):
    engine.version = version
    return 0

VllmEngine.sync = forget
"""


def train(folder: Path, *options: str, before: str = "") -> subprocess.CompletedProcess:
    """before: code that runs in the trainer's process first."""
    (folder / "broken.py").write_text("def never(response, answer):\n    return 0.0\n")
    command = [sys.executable, "-c", before + COMMAND, "train", "quickstart", "--run-dir", "run", *SMALL, *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1500)


def causes(folder: Path) -> list[str]:
    return [one.cause for one in findings(load(str(folder / "run")))]


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize(
    ("cause", "options"),
    [
        (LARGE, ["--optim.lr", "8e-3"]),
        (VERIFIER, ["--reward.grader", "broken:never"]),
        (TEMPLATE, ["--model.prompt_style", "plain"]),
    ],
    ids=["rate", "verifier", "template"],
)
def test_the_first_warning_names_the_cause(cause, options, tmp_path):
    done = train(tmp_path, *options)
    assert done.returncode in (0, 2), done.stderr[-3000:]
    assert causes(tmp_path)[:1] == [cause]
    assert ("warning: prompts have none of <|im_start|>" in done.stderr) == (cause == TEMPLATE)


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_weights_that_the_engine_never_takes_end_the_run_and_are_named(tmp_path):
    done = train(tmp_path, before=NO_SYNC)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "the engine's log-probs differ from the trainer's" in done.stderr
    assert causes(tmp_path)[:1] == [FROZEN]
    assert load(str(tmp_path / "run")).steps[-1]["rollout/logp_gap_mean"] > MOST_GAP  # the refused step is on record


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_a_healthy_run_of_the_same_length_is_suspected_of_none_of_it(tmp_path):
    done = train(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not {LARGE, VERIFIER, FROZEN, TEMPLATE} & {*causes(tmp_path)}
    apart = [value for _, value in load(str(tmp_path / "run")).series("rollout/kl_k3")]
    assert len(apart) == 6
    assert max(apart) < FAR / 4  # what rounding accounts for
