"""Shared by every test: one seed, no network, and Triton's interpreter where there is no GPU to compile for."""

import contextlib
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before the first @triton.jit
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

# vLLM imports it late, and that fails once any test has looked for pip's spec. A machine that only checks the kernels
# may lack it.
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
