"""linear_logprobs on every backend against the float64 reference."""

import math

import pytest
import torch
from luffy_kernels import linear_logprobs, reference
from luffy_kernels.testing import assert_as_good_as

# 70 rows: more than one tile of 64 tokens; V = 2500: more than one split of 2048, no multiple of anything.
N, H, V = 70, 48, 2500
BACKENDS = ("torch", "cpp", "triton")
FLAGS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "token_temperature": {"temperature": "token"},
    "softcap": {"softcap": 5.0},
    "all": {"bias": True, "temperature": "token", "softcap": 5.0, "logit_scale": 1.5},
}


# The interpreter takes 10 s for some of these; test_device.py has Triton with float16 at smaller sizes.
EVERY = [
    pytest.param(backend, dtype, marks=[pytest.mark.slow] if slow and not torch.cuda.is_available() else [])
    for backend in BACKENDS
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for slow in [(backend, dtype) == ("triton", torch.float16)]
]


def problem(dtype, flags, n=N, h=H, v=V):
    hidden = torch.randn(n, h).to(dtype)
    weight = (torch.randn(v, h) * h**-0.5 * 2).to(dtype)
    targets = torch.randint(v, (n,))
    targets[::7] = -100
    options = dict(flags)
    if options.get("bias"):
        options["bias"] = torch.randn(v).to(dtype)
    if options.get("temperature") == "token":
        options["temperature"] = torch.rand(n) + 0.5
    return hidden, weight, targets, options


def wide(options):
    return {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in options.items()}


@pytest.mark.parametrize(("backend", "dtype"), EVERY)
@pytest.mark.parametrize("flags", FLAGS)
def test_matches_float64(backend, dtype, flags):
    hidden, weight, targets, options = problem(dtype, FLAGS[flags])
    hidden[0] = math.nan  # an ignored row
    got = linear_logprobs(hidden, weight, targets, return_entropy=True, chunk_bytes=200_000, backend=backend, **options)
    want = reference.linear_logprobs(hidden.double(), weight.double(), targets, **wide(options))
    atol = 1e-5 if dtype == torch.float32 else 1e-4
    for mine, truth in zip(got, want, strict=True):
        assert mine.dtype == torch.float32
        assert (mine[::7] == 0).all()
        torch.testing.assert_close(mine.double(), truth, rtol=0, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flags", FLAGS)
def test_gradients_are_as_good_as_autograd(backend, flags):
    inputs = problem(torch.bfloat16, FLAGS[flags], v=300)
    upstream = torch.randn(3, N)
    upstream[:, 1::5] = 0

    def gradients(fn, dtype, **extra):
        hidden, weight, targets, options = inputs
        options = wide(options) if dtype == torch.float64 else dict(options)
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        if "bias" in options:
            options["bias"] = options["bias"].to(dtype, copy=True).requires_grad_()
            leaves.append(options["bias"])
        out = fn(leaves[0], leaves[1], targets, **options, **extra)
        total = sum((up.to(x.dtype) * x).sum() for up, x in zip(upstream, out[:3], strict=True))
        return torch.autograd.grad(total, leaves)

    ours = gradients(linear_logprobs, torch.bfloat16, return_entropy=True, chunk_bytes=100_000, backend=backend)
    plain = gradients(reference.linear_logprobs, torch.bfloat16)
    truth = gradients(reference.linear_logprobs, torch.float64)
    for name, mine, baseline, exact in zip(("hidden", "weight", "bias"), ours, plain, truth, strict=False):
        assert mine.dtype == torch.bfloat16
        # Two bf16 roundings of the largest entry, of dz and of the sum: the baseline can be exact by luck.
        assert_as_good_as(mine, baseline, exact, atol=2**-7 * float(exact.abs().max()), name=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gap_is_zero_for_the_most_likely_token_alone(backend, dtype):
    hidden, weight, targets, _ = problem(dtype, {})
    targets = targets.clamp(min=0)
    best = (hidden.double() @ weight.double().T).argmax(-1)
    targets[::2] = best[::2]
    found = linear_logprobs(hidden.requires_grad_(), weight, targets, softcap=5.0, temperature=0.7, backend=backend)
    assert torch.equal(found.gap == 0, targets == best)
    assert (found.gap <= 0).all()
    assert found.logp.requires_grad
    assert not found.gap.requires_grad


@pytest.mark.parametrize("flags", FLAGS)
def test_gradcheck(flags):
    hidden, weight, targets, options = problem(torch.float64, FLAGS[flags], n=4, h=3, v=7)
    bias = options.pop("bias", None)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]

    def fn(hidden, weight, bias=None):
        return linear_logprobs(hidden, weight, targets, bias=bias, return_entropy=True, **options)

    assert torch.autograd.gradcheck(fn, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_vocabulary_and_large_offset(backend):
    hidden, weight, targets, _ = problem(torch.float32, {})
    bias = torch.full((V,), 1e3)
    bias[V // 2 :] = -math.inf
    targets = targets.clamp(max=V // 2 - 1)
    got = linear_logprobs(hidden, weight, targets, bias=bias, return_entropy=True, backend=backend)
    want = reference.linear_logprobs(hidden.double(), weight[: V // 2].double(), targets)
    # Logits near 1000 have an fp32 spacing of 6e-5; summing before centring would lose the entropy altogether.
    torch.testing.assert_close(got.logp.double(), want.logp, rtol=0, atol=3e-4)
    torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=0, atol=3e-4)


def test_cpp_rows_do_not_depend_on_the_batch_or_the_threads():
    hidden, weight, targets, _ = problem(torch.bfloat16, {})
    targets = targets.clamp(min=0)
    together = linear_logprobs(hidden, weight, targets, backend="cpp").logp
    alone = torch.cat(
        [linear_logprobs(hidden[i : i + 1], weight, targets[i : i + 1], backend="cpp").logp for i in (0, 69)]
    )
    assert torch.equal(together[[0, 69]], alone)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(together, linear_logprobs(hidden, weight, targets, backend="cpp").logp)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["empty", "ignored", "strided", "batched", "odd"])
def test_shapes(backend, layout):
    hidden, weight, targets, _ = problem(torch.bfloat16, {}, v=131, h=47 if layout == "odd" else H)
    if layout == "empty":
        hidden, targets = hidden[:0], targets[:0]
    elif layout == "ignored":
        targets = torch.full_like(targets, -100)
    elif layout == "strided":
        weight, hidden, targets = weight.t().contiguous().t(), hidden[::2], targets[::2]
    elif layout == "batched":
        hidden, targets = hidden.view(2, 35, -1), targets.view(2, 35)
    got = linear_logprobs(hidden, weight, targets, backend=backend)
    assert got.logp.shape == targets.shape
    assert got.entropy is None
    want = reference.linear_logprobs(hidden.double(), weight.double(), targets)
    torch.testing.assert_close(got.logp.double(), want.logp, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_masked_everywhere_counts_its_entries_and_no_padding(backend, dtype):
    """Every entry then weighs the same; lanes beyond the vocabulary, which hold as little, must not join them."""
    hidden, weight, bias = torch.randn(3, 16).to(dtype), torch.randn(20, 16).to(dtype), torch.full((20,), -torch.inf)
    out = linear_logprobs(hidden, weight, torch.arange(3), bias=bias, return_entropy=True, backend=backend)
    torch.testing.assert_close(out.logp, torch.full((3,), -math.log(20)))
    torch.testing.assert_close(out.entropy, torch.full((3,), math.log(20)))
