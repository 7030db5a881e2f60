"""linear_cross_entropy against the float64 reference and torch's own, and its contracts."""

import math

import pytest
import torch
from luffy_kernels import _chunks, _torch_rows, linear_cross_entropy, reference
from luffy_kernels.testing import assert_as_good_as
from torch.nn import functional as F

N, H, V = 40, 32, 203
FLAGS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "head": {"bias": True, "temperature": "token", "logit_scale": 1.3},
    "softcap": {"softcap": 4.0, "label_smoothing": 0.1, "z_loss": 1e-2},
    "everything": {"bias": True, "temperature": "token", "label_smoothing": 0.2, "z_loss": 1e-2, "logit_scale": 1.3},
}


def problem(dtype, flags):
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, H, generator=rng), torch.randn(V, H, generator=rng) * 0.3
    targets = torch.randint(V, (N,), generator=rng)
    targets[::5] = -100
    options = dict(flags)
    if options.get("temperature") == "token":
        options["temperature"] = torch.rand(N, generator=rng, dtype=torch.float64) + 0.5
    bias = torch.randn(V, generator=rng) if options.pop("bias", False) else None
    return [x if x is None else x.to(dtype) for x in (hidden, weight, bias)], targets, options


def run(fn, dtype, leaves, targets, options, upstream=None, **extra):
    leaves = [None if x is None else x.to(dtype, copy=True).requires_grad_() for x in leaves]
    if fn is not linear_cross_entropy:
        options = {k: x.to(dtype) if torch.is_tensor(x) else x for k, x in options.items()}
    loss = fn(leaves[0], leaves[1], targets, bias=leaves[2], **options, **extra)
    up = None if upstream is None else upstream.to(loss.dtype)
    return loss, torch.autograd.grad(loss, [x for x in leaves if x is not None], up)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.float64),
        ("torch", torch.float32),
        ("torch", torch.bfloat16),
        ("triton", torch.float32),
        ("triton", torch.bfloat16),
    ],
)
def test_matches_float64(flags, reduction, backend, dtype):
    case = problem(dtype, FLAGS[flags])
    # Not uniform, and partly zero: a backward that reads its first entry alone would pass with ones.
    upstream = torch.randn(N, dtype=torch.float64).masked_fill(torch.arange(N) % 7 == 0, 0.0)
    upstream = upstream if reduction == "none" else torch.tensor(3.0, dtype=torch.float64)
    ours, grads = run(
        linear_cross_entropy, dtype, *case, upstream, reduction=reduction, chunk_bytes=20_000, backend=backend
    )
    truth, exact = run(reference.linear_cross_entropy, torch.float64, *case, upstream, reduction=reduction)
    _, plain = run(reference.linear_cross_entropy, dtype, *case, upstream, reduction=reduction)
    rtol = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-4}[dtype]
    torch.testing.assert_close(ours.double(), truth, rtol=rtol, atol=rtol)
    for name, mine, baseline, wanted in zip(("hidden", "weight", "bias"), grads, plain, exact, strict=False):
        assert mine.dtype == dtype
        eps = {torch.float64: 1e-9, torch.float32: 5e-6, torch.bfloat16: 2**-7}[dtype]
        assert_as_good_as(mine, baseline, wanted, atol=eps * float(wanted.abs().max()), name=name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_is_what_torch_computes_from_logits(reduction, smoothing):
    (hidden, weight, _), targets, _ = problem(torch.float64, {})
    got = linear_cross_entropy(hidden, weight, targets, reduction=reduction, label_smoothing=smoothing)
    want = F.cross_entropy(hidden @ weight.T, targets, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(flags, reduction):
    (hidden, weight, bias), targets, options = problem(torch.float64, FLAGS[flags])
    leaves = [hidden[:4, :5].clone(), weight[:6, :5].clone(), None if bias is None else bias[:6].clone()]
    options = {k: x[:4] if torch.is_tensor(x) else x for k, x in options.items()}
    targets = torch.tensor([0, -100, 5, 2])

    def fn(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction, **options)

    assert torch.autograd.gradcheck(fn, [None if x is None else x.requires_grad_() for x in leaves])


def test_a_scalar_takes_three_products_and_per_token_losses_four(monkeypatch):
    (hidden, weight, _), targets, _ = problem(torch.float32, {})
    products = []
    stats, add = _torch_rows.row_stats, _chunks.Gradients.add
    monkeypatch.setattr(_torch_rows, "row_stats", lambda *a, **k: (products.append(1), stats(*a, **k))[1])
    monkeypatch.setattr(_chunks.Gradients, "add", lambda *a: (products.append(2), add(*a))[1])
    for reduction, count in (("sum", 3), ("none", 4)):
        products.clear()
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        linear_cross_entropy(*leaves, targets, reduction=reduction, backend="torch").sum().backward()
        assert sum(products) == count


def test_a_normalizer_of_ones_own_and_micro_batches():
    (hidden, weight, _), targets, _ = problem(torch.float64, {})
    count = torch.tensor(17.0)
    whole = linear_cross_entropy(hidden, weight, targets, normalizer=count)
    parts = [linear_cross_entropy(hidden[a : a + 8], weight, targets[a : a + 8], normalizer=17) for a in range(0, N, 8)]
    torch.testing.assert_close(whole, sum(parts))


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_learn_from_is_zero_and_connected(rows):
    hidden, weight = torch.full((rows, H), math.nan, requires_grad=True), torch.randn(V, H, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        loss = linear_cross_entropy(hidden, weight, torch.full((rows,), -100), reduction=reduction)
        grads = torch.autograd.grad(loss.sum(), (hidden, weight))
        assert not loss.any()
        assert not any(grad.any() for grad in grads)


def test_stride_0_upstream_and_leading_dimensions():
    (hidden, weight, _), targets, _ = problem(torch.float32, {})
    hidden, targets = hidden.view(4, 10, H).transpose(0, 1).requires_grad_(), targets.view(4, 10).T
    loss = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert loss.shape == targets.shape
    (got,) = torch.autograd.grad(loss, hidden, torch.ones(()).expand(10, 4))
    (want,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, reduction="sum"), hidden)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
def test_opcheck_and_compile(backend):
    (hidden, weight, bias), targets, _ = problem(torch.float32, {"bias": True})
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    for per_token in (False, True):
        args = (*leaves, targets, 0.1, 0.01, torch.ones(()), None, 1.0, -100, None, 0, 10_000, per_token, [True] * 3)
        op = getattr(torch.ops.luffy_kernels, f"cross_entropy_{backend}").default
        torch.library.opcheck(op, args)

    def step(hidden, weight):
        return (
            linear_cross_entropy(hidden, weight, targets)
            + linear_cross_entropy(hidden, weight, targets, reduction="none").square().sum()
        )

    want = torch.autograd.grad(step(hidden, weight), (hidden, weight))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(hidden, weight), (hidden, weight)), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"reduction": "average"}, "reduction must be one of"),
        ({"reduction": "sum", "normalizer": 3.0}, "normalizer must be None unless"),
        ({"normalizer": 0.0}, "normalizer must be positive"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"z_loss": -1.0}, "z_loss must be"),
        ({"backend": "gpu"}, "backend must be one of"),
    ],
)
def test_errors_name_the_argument(change, text):
    (hidden, weight, _), targets, _ = problem(torch.float32, {})
    with pytest.raises(ValueError, match="linear_cross_entropy: " + text):
        linear_cross_entropy(hidden, weight, targets, **change)
