"""Wide products of narrow operands: builds that have them, builds that do not, and builds whose result is rounded."""

import os
from pathlib import Path

import pytest
import torch
from luffy_kernels import _gemm, _native, linear_logprobs, linear_policy_loss, policy_gradient

mm, addmm = torch.mm, torch.addmm


def wide_mm(a, b, *, out_dtype=None, out=None):
    """torch.mm as a CUDA build has it, on CPU tensors."""
    if out_dtype is None:
        return mm(a, b) if out is None else mm(a, b, out=out)
    product = mm(a.to(out_dtype), b.to(out_dtype))
    return product if out is None else out.copy_(product)


def wide_addmm(c, a, b, *, out_dtype=None, out=None):
    return out.copy_(c + mm(a.to(out_dtype), b.to(out_dtype)))


def rounded_mm(a, b, *, out_dtype=None, out=None):
    product = mm(a, b).to(out_dtype or a.dtype)
    return product if out is None else out.copy_(product)


def narrow_mm(a, b, *, out_dtype=None, **options):
    if out_dtype is not None:
        raise RuntimeError("out_dtype is not supported")
    return mm(a, b, **options)


def narrow_addmm(*args, **options):
    raise RuntimeError("out_dtype is not supported")


BUILDS = {
    "both": (wide_mm, wide_addmm, True, True),
    "mm_alone": (wide_mm, narrow_addmm, True, False),
    "neither": (narrow_mm, narrow_addmm, False, False),
    "rounded": (rounded_mm, lambda c, a, b, *, out_dtype, out: out.copy_(c + mm(a, b)), False, False),
}


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    fake_mm, fake_addmm, *expected = BUILDS[request.param]
    for probe in (_gemm.widens, _gemm.adds_wide):
        probe.cache_clear()
    monkeypatch.setattr(torch, "mm", fake_mm)
    monkeypatch.setattr(torch, "addmm", fake_addmm)
    yield expected
    for probe in (_gemm.widens, _gemm.adds_wide):
        probe.cache_clear()


@pytest.mark.parametrize("operand", [torch.bfloat16, torch.float16])
def test_the_probe_believes_what_it_sees(build, operand):
    assert [_gemm.widens("cpu", operand), _gemm.adds_wide("cpu", operand)] == build


@pytest.mark.parametrize("fresh", [True, False])
def test_sums_stay_in_float32(build, fresh):
    a, b = torch.randn(40, 30).bfloat16(), torch.randn(30, 20).bfloat16()
    out = torch.full((40, 20), torch.nan if fresh else 1.0)
    _gemm.accumulate(out, a, b, fresh=fresh)
    want = a.double() @ b.double() + (0.0 if fresh else 1.0)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)


def test_log_probs_are_float32_exact_in_every_build(build):
    hidden, weight = torch.randn(9, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    targets = torch.randint(50, (9,))
    options = {"advantages": 1.0, "losses": policy_gradient(), "old_logp": "current", "normalizer": 1.0}
    got = linear_policy_loss(hidden, weight, targets, backend="triton", **options).logp
    want = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("newer", [True, False])
def test_tf32_is_off_inside_and_as_it_was_outside(newer):
    """Whichever of torch's two settings the program used; reading the older one after the newer raises."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    try:
        if newer:
            backend.fp32_precision = "tf32"
        else:
            backend.allow_tf32 = True
        with _gemm.ieee_float32(torch.device("cuda")):
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


@pytest.mark.skipif(_native.error is not None, reason="the compiled library is not built")
def test_the_processors_own_bfloat16_products_are_used():
    """With a matrix unit or with dot products alone (AVX-512 BF16), instead of operands widened to float32."""
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text().split() if cpu.exists() else []
    limited = any(name in os.environ for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"))
    words = torch.ops.luffy_kernels.bf16_words
    assert words(torch.empty(9, 64, dtype=torch.bfloat16)) == ("avx512_bf16" in flags) or limited
    assert not words(torch.empty(9, 63, dtype=torch.bfloat16))  # pairs of the inner dimension
    assert not words(torch.empty(9, 64, dtype=torch.float16))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.skipif(_native.error is not None, reason="the compiled library is not built")
def test_bfloat16_logits_do_not_need_onednn(backend):
    """torch.backends.mkldnn may be off for a while; so may a weight begin at an odd entry of a flat buffer."""
    hidden, flat, targets = torch.randn(9, 64).bfloat16(), torch.randn(50 * 64 + 1).bfloat16(), torch.randint(50, (9,))
    weight = flat[1:].view(50, 64).requires_grad_()
    results = []
    for enabled in (False, True, False):
        with torch.backends.mkldnn.flags(enabled=enabled):
            logp = linear_logprobs(hidden, weight, targets, backend=backend).logp
            results.append((logp.detach(), *torch.autograd.grad(logp.sum(), weight)))
    for logp, grad in results[1:]:
        torch.testing.assert_close(logp, results[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, results[0][1], rtol=2e-2, atol=2e-2)
