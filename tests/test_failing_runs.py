"""Runs that were made to fail: the report's first warning names the cause. The quickstart's model, minutes each."""

import subprocess
import sys
from pathlib import Path

import pytest

from luffy.reporting.rules import findings
from luffy.reporting.runs import load

SMALL = ["--train.steps", "10", "--eval.every", "5", "--data.problems.heldout", "48", "--data.problems.ood", "16"]
CAUSES = {
    "updates that are too large": ["--optim.lr", "8e-3"],
    "a verifier that turns down verified traces": ["--reward.grader", "broken:never"],
}


def train(folder: Path, *options: str) -> subprocess.CompletedProcess:
    (folder / "broken.py").write_text("def never(response, answer):\n    return 0.0\n")
    command = [sys.executable, "-m", "luffy", "train", "quickstart", "--run-dir", "run", *SMALL, *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("cause", CAUSES)
def test_the_first_warning_names_the_cause(cause, tmp_path):
    done = train(tmp_path, *CAUSES[cause])
    assert done.returncode in (0, 2), done.stderr[-3000:]
    found = findings(load(str(tmp_path / "run")))
    assert [one.cause for one in found][:1] == [cause]
