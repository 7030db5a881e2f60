"""Shared by every test: one seed, no network, and Triton's interpreter where there is no GPU to compile for."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before the first @triton.jit
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import setuptools  # noqa: F401  vLLM imports it late, and that fails once any test has looked for pip's spec


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
