"""Every file of `examples/` runs as it is."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))
NEEDS = {"trl_grpo": "trl"}
SAYS = {
    "transformers_loss": "logits None",
    "trl_grpo": "train_runtime",
    "liger_grpo": "clipped",
    "verl_head": "torch's place",
    "openrlhf_actor": "Logits (2, 128, 32000)",
    "prime_rl_head": "log-probs (2, 64)",
    "megatron_head": "SkyRL 9.",
}


def test_all_are_known():
    assert {path.stem for path in EXAMPLES} == SAYS.keys()
    assert all(len(path.read_text().splitlines()) <= 60 for path in EXAMPLES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    pytest.importorskip(NEEDS.get(path.stem, "torch"), reason=f"needs {NEEDS.get(path.stem)}")
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert SAYS[path.stem] in done.stdout
