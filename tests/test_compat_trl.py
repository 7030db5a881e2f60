"""TRL's trainers as they are installed, with and without the adapter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_tokenizer

pytest.importorskip("trl", reason="needs trl")

SCRIPT = Path(__file__).with_name("trl_steps.py")
VARIANTS = {
    "qwen2": {},
    "llama": {"model": "llama"},
    "kl": {"beta": 0.1, "loss_type": "grpo", "temperature": 0.7},
    "dr_grpo": {"loss_type": "dr_grpo", "model": "gemma2"},
    "bnpo": {"loss_type": "bnpo", "gradient_checkpointing": True},
    "lora": {"lora": True},
    "compile": {"torch_compile": True},
    "rloo": {"trainer": "rloo", "beta": 0.05},
    "sft": {"trainer": "sft"},
    "dpo": {"trainer": "dpo"},
    "wpo": {"trainer": "dpo", "use_weighting": True},
    "kto": {"trainer": "kto"},
}
QUICK = ("kl",)
SAME = ("loss", "grad_norm", "reward", "entropy", "kl", "clip_ratio/region_mean", "mean_token_accuracy")
SAME += ("rewards/margins", "logits/chosen", "logits/rejected", "logps/chosen")


def steps(tmp_path: Path, ours: bool, **options) -> list[dict[str, float]]:
    """What each step of a training says, in a process of its own."""
    out = tmp_path / f"{ours}.json"
    asked = json.dumps({"ours": ours, "out": str(out), "folder": str(tmp_path), **options})
    done = subprocess.run([sys.executable, SCRIPT, asked], capture_output=True, text=True, cwd=tmp_path, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in VARIANTS])
def test_a_training_says_the_same(name, tmp_path):
    """Five steps: losses, gradient norms and metrics, to 1e-5 of float32."""
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    theirs, ours = (steps(tmp_path, ours, **VARIANTS[name]) for ours in (False, True))
    assert len(theirs) == len(ours) == 5
    assert theirs[0].pop("calls") == 0
    assert ours[0].pop("calls") > 0
    assert max(step["grad_norm"] for step in theirs) > 1e-3
    for one, other in zip(theirs, ours, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() & set(SAME):
            assert other[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_output_is_trls(bias, autocast):
    """One by one, with a scale and a temperature."""
    from luffy_kernels.compat.trl import OUTPUTS, chunked_logprobs
    from trl.trainer import utils

    torch.manual_seed(0)
    theirs = utils._ChunkedLogProbFunction
    hidden, weight = torch.randn(40, 16), torch.randn(90, 16)
    targets = torch.randint(0, 90, (40,))
    targets[::2] = (hidden @ weight.T).argmax(-1)[::2]
    shift = torch.randn(90) * 0.1 if bias else None
    for names in (OUTPUTS, ("log_probs", "is_top1"), ("log_probs",)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, right = (
                fn.apply(hidden, weight, shift, targets, 0.7, 64, None, 0.5, names)
                for fn in (chunked_logprobs(theirs), theirs)
            )
        assert [x is None for x in found] == [x is None for x in right]
        for name, ours, other in zip(OUTPUTS, found, right, strict=True):
            if ours is None:
                continue
            assert ours.dtype == other.dtype
            bound = 5e-2 if autocast else 2e-5
            if name == "is_top1":
                assert 0.3 < ours.float().mean() < 0.7
                assert (ours == other).float().mean() > (0.9 if autocast else 0.999)
            else:
                torch.testing.assert_close(ours, other, rtol=bound, atol=bound, msg=name)
    calls = []
    capped = chunked_logprobs(type("Theirs", (), {"apply": staticmethod(lambda *given: calls.append(given))}))
    capped.apply(hidden, weight, None, targets, 1.0, 64, 2.0, 1.0, OUTPUTS)
    assert len(calls) == 1  # a mean of capped logits is no product
    weight.ds_id = 0
    capped.apply(hidden, weight, None, targets, 1.0, 64)
    assert len(calls) == 2  # ZeRO-3


def test_undo_puts_back_the_very_objects():
    from luffy_kernels.compat import trl
    from trl.trainer import utils

    before = (utils._ChunkedLogProbFunction, utils._use_triton)
    assert trl.apply()
    assert trl.apply()
    assert utils._ChunkedLogProbFunction is not before[0]
    trl.undo()
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before
