"""Runs that were made to fail: the report's first warning names the cause. The quickstart's model, minutes each."""

import subprocess
import sys
from pathlib import Path

import pytest

from luffy.reporting.rules import findings
from luffy.reporting.runs import load

SMALL = ["--train.steps", "12", "--eval.every", "6", "--data.problems.heldout", "48", "--data.problems.ood", "0"]
FROZEN = """
import sys
from luffy.rollout.vllm_engine import VllmEngine

def sync(self, policy, dtype, version):
    self.version = version
    return 0

VllmEngine.sync = sync
from luffy.cli import main
sys.exit(main(sys.argv[1:]))
"""
CAUSES = {
    "updates that are too large": ["--optim.lr", "8e-3"],
    "a verifier that turns down verified traces": ["--reward.grader", "broken:never"],
    "prompts in a form that the model does not know": ["--model.prompt_style", "plain"],
}


def train(folder: Path, *options: str, code: str | None = None) -> subprocess.CompletedProcess:
    (folder / "broken.py").write_text("def never(response, answer):\n    return 0.0\n")
    start = ["-m", "luffy"] if code is None else ["-c", code]
    command = [sys.executable, *start, "train", "quickstart", "--run-dir", "run", *SMALL, *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("cause", CAUSES)
def test_the_first_warning_names_the_cause(cause, tmp_path):
    done = train(tmp_path, *CAUSES[cause])
    assert done.returncode in (0, 2), done.stderr[-3000:]
    found = findings(load(str(tmp_path / "run")))
    assert [one.cause for one in found][:1] == [cause]


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_sampler_that_keeps_its_weights(tmp_path):
    done = train(tmp_path, "--optim.lr", "4e-4", code=FROZEN)
    assert done.returncode in (0, 2), done.stderr[-3000:]
    found = findings(load(str(tmp_path / "run")))
    assert [one.cause for one in found][:1] == ["a sampler whose weights fall behind"]
