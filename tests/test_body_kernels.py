"""Liger's kernels in a model's blocks, under Triton's interpreter where there is no GPU: the same numbers."""

import os
import subprocess
import sys

import pytest
import torch
from tiny import ROOT

from luffy import body_kernels
from luffy.errors import UserError

SCRIPT = """
import sys
import torch
from test_load import save_model
from test_packing import GROUPS
from luffy.config import ModelConfig
from luffy.load import empty_lm, load_weights
from luffy.model import Policy
from luffy.packing import pack

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Scalar(float):
    def to(self, dtype):
        return self


if device.type == "cpu":  # the interpreter hands Python's floats to kernels as they are, and has no libdevice
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime.interpreter import GridExecutor

    def call(self, *args, run=GridExecutor.__call__, **options):
        return run(self, *(Scalar(x) if isinstance(x, float) else x for x in args), **options)

    GridExecutor.__call__ = call
    rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)  # as patched when it is called

folder = str(save_model(sys.argv[1], sys.argv[2]))
found = []
for kernels in ("torch", "liger"):
    policy = Policy(empty_lm(folder, ModelConfig(body_kernels=kernels)), 1.0)
    load_weights(policy.train(), folder, device)
    [micro] = pack(GROUPS, lambda g: g.rows, 1000)
    logp = policy(micro.to(device))
    logp.sum().backward()
    found.append([logp.detach(), *(p.grad for p in policy.parameters())])
    block, rotate = policy.lm.model.layers[0], sys.modules[type(policy.lm).__module__].apply_rotary_pos_emb
    for part in (block.input_layernorm.forward, block.post_attention_layernorm.forward, block.mlp.forward, rotate):
        assert part.__module__.startswith("liger") == (kernels == "liger"), part
for ours, theirs in zip(*found, strict=True):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
"""


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow), "qwen3"])
def test_a_patched_model_computes_what_it_did(family, tmp_path):
    pytest.importorskip("liger_kernel")
    env = os.environ | {
        "PYTHONPATH": str(ROOT / "tests"),
        "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1",
    }
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), family]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_it_is_refused_where_it_cannot_run(monkeypatch):
    model = torch.nn.Module()
    model.config = type("Config", (), {"model_type": "unheard-of"})()
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(UserError, match='"liger" needs a GPU; leave it "torch"'):
            body_kernels.use_liger(model)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "liger_kernel.transformers", None)
        with pytest.raises(UserError, match="liger-kernel is not installed; install the `liger` extra"):
            body_kernels.use_liger(model)
    pytest.importorskip("liger_kernel")
    with pytest.raises(UserError, match="no kernels for unheard-of models"):
        body_kernels.use_liger(model)
