"""Shared by every test: one seed, no network, and Triton's interpreter where there is no GPU to compile for."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before the first @triton.jit
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
