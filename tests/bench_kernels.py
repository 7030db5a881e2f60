"""Micro-benchmarks of the CPU kernels under pytest-benchmark, to compare commits:

    pip install pytest-benchmark
    pytest tests/bench_kernels.py --benchmark-autosave
    pytest tests/bench_kernels.py --benchmark-compare --benchmark-group-by=name

Not part of the default run (pytest collects test_*.py). Peers and README's table: `python -m bench.ops`.
"""

import pytest
import torch
from luffy_kernels import linear_cross_entropy, linear_logprobs, linear_policy_loss, policy_gradient

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.benchmark
SHAPES = {"smollm2": (1024, 576, 49152), "wide": (256, 2048, 32000)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


@pytest.fixture(params=DTYPES)
def head(request, shape):
    n, h, v = shape
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=rng).to(DTYPES[request.param]).requires_grad_()
    weight = torch.randn(v, h, generator=rng).mul_(2 * h**-0.5).to(DTYPES[request.param]).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), generator=rng)


def test_logprobs(benchmark, head):
    with torch.no_grad():
        benchmark(linear_logprobs, *head)


@pytest.mark.parametrize("entropy", [0.0, 0.01])
def test_policy_loss(benchmark, head, entropy):
    advantages = torch.randn(len(head[2]))
    options = {"losses": policy_gradient(0.2, 0.28), "old_logp": "current", "normalizer": 8192.0}

    def step():
        out = linear_policy_loss(*head, advantages=advantages, entropy_coef=entropy, **options)
        return torch.autograd.grad(out.loss, head[:2])

    benchmark(step)


def test_cross_entropy(benchmark, head):
    benchmark(lambda: torch.autograd.grad(linear_cross_entropy(*head), head[:2]))
