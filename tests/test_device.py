"""Every operator on the device at hand against the float64 reference: on a GPU as compiled, else interpreted and tiny.

`scripts/gpu_check.sh` runs this file alone, with nothing installed but torch, Triton and pytest.
"""

import functools
import warnings
from pathlib import Path

import pytest
import torch
from bits import assert_same_bits
from luffy_kernels import (
    _gemm,
    _library,
    _native,
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_loss,
    nll,
    policy_gradient,
    reference,
    shaped,
)
from luffy_kernels.testing import assert_as_good_as
from test_policy_loss import FLAGS, LOSSES

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = ("torch", "triton", "auto")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# (N, H, V): V odd; V a multiple of 128, where loads are widest, and H no power of two.
SMALL, LARGE = ((300, 512, 32_003), (300, 896, 152_064)) if GPU else ((12, 32, 139), (6, 48, 320))
CHUNK = 16 << 20 if GPU else 8_000  # several chunks of any of these sizes
NEEDS_GPU = pytest.mark.skipif(not GPU, reason="no GPU here: on CPU nothing allocates or waits as it would on a device")
# A GPU's float32 product adds up one term after the other: sqrt(H) roundings of logits that reach 16 are 2e-5.
LOGP_ATOL = {torch.bfloat16: 1e-4, torch.float16: 1e-4, torch.float32: 3e-5 if GPU else 1e-5}
# Of the largest entry of a gradient: two roundings in its dtype, and for float32 what log-probs are off by.
EPS = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 5e-5 if GPU else 1e-5}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_size = pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
OPS = ("logprobs", "policy", "cross_entropy")


def rand(*shape):
    return torch.rand(*shape, device=DEVICE, dtype=torch.float64)


def make_head(dtype, size):
    """hidden, weight, targets: every seventh row ignored, probabilities of targets from 1 / V to nearly 1."""
    n, h, v = size
    weight = torch.randn(v, h, device=DEVICE) * 2 * h**-0.5
    targets = torch.randint(v, (n,), device=DEVICE)
    hidden = torch.randn(n, h, device=DEVICE) + 4 * rand(n, 1).float() * weight[targets]
    targets[::7] = -100
    return hidden.to(dtype), weight.to(dtype), targets


def make_options(hidden, weight, targets, flags):
    """Per-token arguments of the policy loss, in float64, under these flags; policies on both sides of the clips."""
    n, v, dtype = len(targets), len(weight), hidden.dtype
    logp = reference.linear_logprobs(hidden.double(), weight.double(), targets).logp
    old_logp, ref_logp = ((logp + rand(n) - 0.5).clamp(max=0) for _ in range(2))
    options = {"losses": LOSSES, "loss_id": torch.randint(len(LOSSES), (n,), device=DEVICE), "normalizer": 7.0}
    options |= {"advantages": 4 * rand(n) - 2, "old_logp": old_logp, "ref_logp": ref_logp}
    options["advantages"][5::9] = 0
    for name, value in flags.items():
        options[name] = rand(n) + 0.5 if value == "token" else value
    if options.get("bias") == "bias":
        options["bias"] = torch.randn(v, device=DEVICE).to(dtype)
    return options


def against_reference(fn, plain_fn, scalar, head, options, **extra):
    """(our result, the float64 one); our gradients of `scalar(result)` are as good as autograd's in the same dtype."""
    dtype, targets = head[0].dtype, head[2]

    def gradients(function, dtype, options, **extra):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in head[:2]]
        if "bias" in options:
            options["bias"] = options["bias"].to(dtype, copy=True).requires_grad_()
            leaves.append(options["bias"])
        out = function(leaves[0], leaves[1], targets, **options, **extra)
        return out, torch.autograd.grad(scalar(out), leaves)

    def cast(dtype):
        floats = (k for k, x in options.items() if isinstance(x, torch.Tensor) and x.is_floating_point())
        return options | {k: options[k].to(dtype) for k in floats}

    found, ours = gradients(fn, dtype, dict(options), **extra)
    truth, exact = gradients(plain_fn, torch.float64, cast(torch.float64))
    _, plain = gradients(plain_fn, dtype, cast(dtype))
    for name, mine, baseline, wanted in zip(("hidden", "weight", "bias"), ours, plain, exact, strict=False):
        assert mine.dtype == dtype
        # Where a 16-bit baseline overflows, only the allowance is left.
        baseline = torch.where(baseline.isfinite(), baseline.double(), wanted)
        assert_as_good_as(mine, baseline, wanted, atol=EPS[dtype] * float(wanted.abs().max()), name=name)
    return found, truth


@each_size
@each_backend
@each_dtype
def test_logprobs(size, backend, dtype):
    options = {"temperature": rand(size[0]) + 0.5, "bias": torch.randn(size[2], device=DEVICE).to(dtype)}
    upstream = torch.randn(3, size[0], device=DEVICE)
    upstream[:, 1::5] = 0
    ours = functools.partial(linear_logprobs, return_entropy=True)
    found, truth = against_reference(
        ours,
        reference.linear_logprobs,
        lambda out: sum((up.to(x.dtype) * x).sum() for up, x in zip(upstream, out[:3], strict=True)),
        make_head(dtype, size),
        options,
        backend=backend,
        chunk_bytes=64 << 20 if GPU else 4_000,
    )
    atol = LOGP_ATOL[dtype]
    torch.testing.assert_close(found.logp.double(), truth.logp, rtol=0, atol=atol)
    for name in ("entropy", "lse"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(truth, name), rtol=atol, atol=atol, msg=name)


def check_policy_loss(size, flags, backend, dtype):
    head = make_head(dtype, size)
    options = make_options(*head, FLAGS[flags])
    functions = linear_policy_loss, reference.linear_policy_loss
    found, truth = against_reference(
        *functions, lambda out: out.loss, head, options, backend=backend, chunk_bytes=CHUNK
    )
    atol = LOGP_ATOL[dtype]
    torch.testing.assert_close(found.logp.double(), truth.logp, rtol=0, atol=atol)
    for name in ("entropy", "ratio", "kl"):
        mine, want = getattr(found, name).double(), getattr(truth, name)
        torch.testing.assert_close(mine, want, rtol=2 * atol, atol=atol, msg=name)
    torch.testing.assert_close(found.loss.double(), truth.loss, rtol=10 * atol, atol=10 * atol)


@pytest.mark.parametrize("flags", FLAGS)
@each_backend
@each_dtype
def test_policy_loss(flags, backend, dtype):
    check_policy_loss(SMALL, flags, backend, dtype)


@each_backend
@each_dtype
def test_policy_loss_with_a_large_vocabulary(backend, dtype):
    check_policy_loss(LARGE, "everything", backend, dtype)


@each_size
@each_backend
@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy(size, backend, dtype, reduction):
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0, "reduction": reduction}
    upstream = torch.randn(size[0], device=DEVICE) if reduction == "none" else torch.ones((), device=DEVICE)
    found, truth = against_reference(
        linear_cross_entropy,
        reference.linear_cross_entropy,
        lambda loss: (upstream.to(loss.dtype) * loss).sum(),
        make_head(dtype, size),
        options,
        backend=backend,
        chunk_bytes=CHUNK,
    )
    torch.testing.assert_close(found.double(), truth, rtol=LOGP_ATOL[dtype], atol=LOGP_ATOL[dtype])


def call(op, hidden, weight, targets, **extra):
    """A scalar of one of OPS, and what it returns per token."""
    if op == "logprobs":
        out = linear_logprobs(hidden, weight, targets, return_entropy=True, **extra)
        return out.logp.sum() - 0.3 * out.entropy.sum() + 0.1 * out.lse.sum(), out
    if op == "policy":
        options = {"losses": shaped(), "advantages": 1.0, "entropy_coef": 0.1, "normalizer": 3.0}
        out = linear_policy_loss(hidden, weight, targets, **options, **extra)
        return out.loss, out[1:]
    return linear_cross_entropy(hidden, weight, targets, **extra), ()


def outcome(op, hidden, weight, targets, **extra):
    """Everything that a call and its backward give, as a list of tensors."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    scalar, found = call(op, hidden, weight, targets, **extra)
    return [scalar.detach(), *(x.detach() for x in found), *torch.autograd.grad(scalar, (hidden, weight))]


@each_dtype
def test_a_row_is_the_same_bits_in_any_batch(dtype):
    hidden, weight, targets = make_head(dtype, SMALL)
    n = len(targets)
    together = linear_logprobs(hidden, weight, targets, return_entropy=True, backend="triton")
    for rows in (slice(1, 2), slice(n - 1, n), slice(n // 4, n // 2)):
        alone = linear_logprobs(hidden[rows], weight, targets[rows], return_entropy=True, backend="triton")
        for a, b in zip(together, alone, strict=True):
            assert_same_bits(a[rows], b)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_same_bits_every_time(op, backend):
    head = make_head(torch.bfloat16, SMALL)
    first, second = (outcome(op, *head, backend=backend, chunk_bytes=CHUNK) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_more_rows_than_the_second_axis_of_a_grid(op, backend):
    """70,000 rows; interpreted, only the last ones are not ignored."""
    hidden, weight, targets = make_head(torch.float32, (70_000, 16, 33))
    if not GPU:
        targets[:-5] = -100
    got = outcome(op, hidden, weight, targets, backend=backend)
    want = outcome(op, hidden.double(), weight.double(), targets, backend="torch")
    for mine, truth in zip(got, want, strict=True):
        assert_close_to(mine, truth, 1e-4)


def assert_close_to(mine, truth, eps):
    largest = max(1e-6, float(truth.double().abs().max()))
    torch.testing.assert_close(mine.double(), truth.double(), rtol=0, atol=eps * largest)


@pytest.mark.parametrize("op", OPS)
@each_backend
def test_strides(op, backend):
    hidden, weight, targets = make_head(torch.bfloat16, SMALL)
    want = outcome(op, hidden[::2].contiguous(), weight, targets[::2].contiguous(), backend=backend)
    got = outcome(op, hidden[::2], weight.t().contiguous().t(), targets[::2], backend=backend)
    wide = hidden.repeat_interleave(2, 1)[:, ::2]
    got_columns = outcome(op, wide[::2], weight, targets[::2], backend=backend)
    for mine, other, truth in zip(got, got_columns, want, strict=True):
        assert_close_to(mine, truth, 2**-7)
        assert_close_to(other, truth, 2**-7)


@pytest.mark.parametrize("op", OPS)
@each_backend
def test_a_frozen_weight_gets_no_gradient_and_changes_none(op, backend):
    hidden, weight, targets = make_head(torch.bfloat16, SMALL)
    *_, both, _ = outcome(op, hidden, weight, targets, backend=backend)
    leaf = hidden.detach().requires_grad_()
    scalar, _ = call(op, leaf, weight, targets, backend=backend)
    scalar.backward()
    assert torch.equal(leaf.grad, both)
    assert weight.grad is None


@pytest.mark.parametrize("op", OPS)
@each_backend
def test_nan_in_ignored_rows_reaches_nothing(op, backend):
    hidden, weight, targets = make_head(torch.bfloat16, SMALL)
    clean = outcome(op, hidden, weight, targets, backend=backend)
    hidden[targets == -100] = torch.nan
    assert all(map(torch.equal, clean, outcome(op, hidden, weight, targets, backend=backend)))


@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
@pytest.mark.parametrize("op", OPS)
@each_backend
def test_a_target_beyond_the_vocabulary(op, backend, debug, monkeypatch):
    """Raises on CPU and where asked to look; on a device a look would synchronise, and the row alone is NaN."""
    monkeypatch.setenv("LUFFY_KERNELS_DEBUG", str(int(debug)))
    hidden, weight, targets = make_head(torch.bfloat16, SMALL)
    bad = targets.clone()
    bad[3], bad[4] = SMALL[2], -1
    if debug or not GPU:
        with pytest.raises(ValueError, match=r"targets must be in \[0, "):
            call(op, hidden, weight, bad, backend=backend)
        return
    scalar, found = call(op, hidden, weight, bad, backend=backend)
    assert scalar.isnan()
    per_token = found[0] if found else -linear_cross_entropy(hidden, weight, bad, reduction="none", backend=backend)
    assert per_token[3:5].isnan().all()
    assert per_token.isnan().sum() == 2


@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
@each_backend
def test_a_loss_id_beyond_the_table(backend, debug, monkeypatch):
    monkeypatch.setenv("LUFFY_KERNELS_DEBUG", str(int(debug)))
    head = make_head(torch.bfloat16, SMALL)
    ids = torch.zeros_like(head[2])
    options = {"losses": (shaped(), nll()), "advantages": 1.0, "normalizer": 1.0, "backend": backend}
    good = linear_policy_loss(*head, loss_id=ids, **options)
    ids[3] = 2
    if debug or not GPU:
        with pytest.raises(ValueError, match=r"loss_id must be in \[0, 2\)"):
            linear_policy_loss(*head, loss_id=ids, **options)
        return
    bad = linear_policy_loss(*head, loss_id=ids, **options)
    assert bad.loss.isnan()
    assert torch.equal(bad.logp, good.logp)


@pytest.mark.parametrize(("name", "value"), [("allow_tf32", True), ("fp32_precision", "tf32")])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_float32_is_not_tf32_where_the_program_allows_that(op, backend, name, value):
    """PyTorch has two ways to allow it, and refuses to read the first one after the second one was used."""
    head, matmul = make_head(torch.float32, LARGE), torch.backends.cuda.matmul
    strict = outcome(op, *head, backend=backend)
    try:
        setattr(matmul, name, value)
        assert all(map(torch.equal, strict, outcome(op, *head, backend=backend)))
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.allow_tf32 = False


def peak(fn):
    """Bytes at the peak of the second call beyond what there was before it; the first compiles and fills caches."""
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = fn()
        torch.cuda.synchronize()
        highest = torch.cuda.max_memory_allocated()
        del result
    return highest - before


@NEEDS_GPU
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_memory_of_the_policy_loss(backend):
    n, h, v = 4096, 1024, 152_064
    hidden, weight, targets = make_head(torch.bfloat16, (n, h, v))
    leaves, chunk_bytes = (hidden.requires_grad_(), weight.requires_grad_()), 256 << 20
    given = {"losses": policy_gradient(0.2, 0.2), "advantages": rand(n).float(), "old_logp": -6 * rand(n).float()}

    def forward():
        return linear_policy_loss(*leaves, targets, **given, normalizer=1.0, chunk_bytes=chunk_bytes, backend=backend)

    gradients_held = 4 * v * h + 2 * n * h  # dW in fp32, dh
    slack = 32 << 20  # outputs and per-token inputs (100 N bytes), a chunk's hidden, cuBLAS
    # Where the build cannot add a product in place, the product of a chunk comes on top.
    product = 0 if _gemm.adds_wide("cuda", torch.bfloat16) else 4 * v * h
    assert peak(forward) <= chunk_bytes + gradients_held + product + slack
    returned = 2 * v * h + 2 * n * h
    both = peak(lambda: torch.autograd.grad(forward().loss, leaves))
    assert both <= gradients_held + max(chunk_bytes + product, returned) + slack


@NEEDS_GPU
def test_memory_of_logprobs_does_not_grow_with_the_vocabulary():
    n, v = 4096, 152_064
    head = make_head(torch.bfloat16, (n, 1024, v))
    partials = 12 * n * -(-v // 1024)  # three numbers per token and split, of 1,024 entries at least
    with torch.no_grad():
        assert peak(lambda: linear_logprobs(*head, backend="triton")) <= partials + (4 << 20)


@NEEDS_GPU
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_host_waits_no_more_often_for_more_chunks(op, backend):
    """Choosing the valid rows waits once. A wait per chunk would leave the device idle between chunks."""
    head = make_head(torch.bfloat16, SMALL)

    def waits(chunk_bytes):
        """The line under each that waits."""
        outcome(op, *head, backend=backend, chunk_bytes=chunk_bytes)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                outcome(op, *head, backend=backend, chunk_bytes=chunk_bytes)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        said = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
        return sorted(f"{Path(warning.filename).name}:{warning.lineno}" for warning in said)

    few, many = waits(1 << 30), waits(2 << 20)
    assert few == many
    assert few


def test_auto_is_the_fused_backend_here():
    wanted = "triton" if GPU else "cpp" if _native.error is None else "torch"
    assert _library.resolve("linear_policy_loss", "auto", torch.device(DEVICE), torch.bfloat16) == wanted
