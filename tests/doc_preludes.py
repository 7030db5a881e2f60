"""What the code blocks of the docs take for granted: each gives the names that a block begins with, and tidies up."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny import ROOT, make_model


def _operands() -> dict[str, Any]:
    """Six rows of two sequences, a head of a hundred entries."""
    hidden = torch.randn(2, 6, 16, requires_grad=True)
    return {
        "hidden": hidden,
        "targets": torch.randint(0, 100, (2, 6)),
        "advantages": torch.tensor([[0.5], [-0.5]]),
        "weight": torch.randn(100, 16, requires_grad=True),
    }


@contextmanager
def rollouts_and_traces() -> Iterator[dict[str, Any]]:
    given = _operands()
    head = torch.nn.Linear(16, 100, bias=False)
    trace = torch.tensor([[False] * 6, [True] * 6])
    yield given | {"lm_head": head, "head_weight": head.weight, "is_trace": trace, "is_demonstration": trace}


@contextmanager
def model() -> Iterator[dict[str, Any]]:
    """A tiny causal language model of transformers, and ids."""
    from transformers import AutoModelForCausalLM

    make_model(Path("model"))
    yield {"model": AutoModelForCausalLM.from_pretrained("model"), "input_ids": torch.randint(3, 200, (2, 9))}


@contextmanager
def checkpoint() -> Iterator[dict[str, Any]]:
    make_model(Path("folder"))
    yield {"folder": "folder", "smaller": "smaller"}


@contextmanager
def trl() -> Iterator[dict[str, Any]]:
    from luffy_kernels.compat import trl

    yield {}
    trl.undo()


@contextmanager
def hub() -> Iterator[dict[str, Any]]:
    """FOLDER as the command above it makes it."""
    command = [sys.executable, str(ROOT / "scripts/hub_layout.py"), "FOLDER", "--license", "apache-2.0"]
    subprocess.run(command, check=True, capture_output=True)
    yield _operands()
