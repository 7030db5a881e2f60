"""The compiled CPU kernels: their functions, every instruction set they have, and what their schedule promises."""

import math
import os
import subprocess
import sys

import pytest
import torch
from luffy_kernels import (
    _cpp_rows,
    _native,
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_loss,
    policy_gradient,
    reference,
)

pytestmark = pytest.mark.skipif(_native.error is not None, reason="the compiled library is not built")
OPS = torch.ops.luffy_kernels
HERE = os.path.dirname(__file__)
EXP_ULP, LOG_ULP = 1.25, 2.0  # exp: 1 with fused multiply-add


def ulps(got, exact):
    """Distance in units of the last place of float32 at the exact value."""
    unit = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=2.0**-126))) - 23)
    return float(((got.double() - exact) / unit).abs().max())


def check_functions():
    """exp and log against float64, over the whole range and at its ends."""
    inputs = torch.cat([torch.linspace(-87, 88, 2_000_001), torch.linspace(-1e-3, 1e-3, 20_001)])
    assert ulps(OPS.tile_exp(inputs), inputs.double().exp()) <= EXP_ULP
    ends = torch.tensor([-math.inf, -1e30, -2e30, -87.5, 0.0, 89.0, math.inf, math.nan])
    got = OPS.tile_exp(ends)
    assert not got[:4].any()
    assert got[4] == 1
    assert ulps(got[5:7], torch.tensor([88.0, 88.0]).double().exp()) <= EXP_ULP  # held there: finite, and far too large
    assert got[7].isnan()
    positive = torch.logspace(-37.9, 38.5, 2_000_001, dtype=torch.float64).float()
    assert ulps(OPS.tile_log(positive), positive.double().log()) <= LOG_ULP
    near_1 = torch.linspace(0.7, 1.4, 200_001)
    error = (OPS.tile_log(near_1).double() - near_1.double().log()).abs() / near_1.double().log().abs().clamp(min=1e-7)
    assert float(error.max()) <= 4e-7
    assert OPS.tile_log(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


def problem(dtype, n=150, h=66, v=1003, spread=2.0):
    rng = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, h, generator=rng).to(dtype)
    weight = (spread * h**-0.5 * torch.randn(v, h, generator=rng)).to(dtype)
    targets = torch.randint(v, (n,), generator=rng)
    targets[::9] = -100
    advantages = torch.randn(n, generator=rng)
    advantages[::5] = 0
    return hidden, weight, targets, advantages


def outcome(fn, dtype, hidden, weight, targets, advantages, bias=None, **options):
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight, *([] if bias is None else [bias]))]
    options |= {"bias": None if bias is None else leaves[2], "advantages": advantages.to(leaves[0].dtype)}
    loss = policy_gradient(0.2, 0.28)
    out = fn(leaves[0], leaves[1], targets, losses=loss, old_logp="current", normalizer=9.0, **options)
    return out, torch.autograd.grad(out.loss, leaves)


OPTIONS = {
    "plain": {},
    "entropy": {"entropy_coef": 0.3},
    "head": {"entropy_coef": 0.3, "softcap": 4.0, "logit_scale": 1.2, "temperature": 0.8},
}


def check_operators():
    """linear_policy_loss with all its gradients, in every dtype, against float64."""
    for dtype, bound in ((torch.float32, 5e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
        head = problem(dtype)
        bias = torch.randn(1003, generator=torch.Generator().manual_seed(4)).to(dtype)
        for options in OPTIONS.values():
            out, grads = outcome(linear_policy_loss, dtype, *head, bias=bias, backend="cpp", **options)
            truth, exact = outcome(reference.linear_policy_loss, torch.float64, *head, bias=bias, **options)
            torch.testing.assert_close(out.logp.double(), truth.logp, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(out.entropy.double(), truth.entropy, rtol=1e-5, atol=1e-5)
            for mine, want in zip(grads, exact, strict=True):
                torch.testing.assert_close(mine.double(), want, rtol=0, atol=bound * float(want.abs().max()))


def test_functions():
    check_functions()


def test_operators():
    check_operators()


@pytest.mark.parametrize(("isa", "products"), [("base", "SSE41"), ("v3", "AVX2"), ("v4", "AVX512_CORE"), ("v4", "ALL")])
def test_every_instruction_set(isa, products):
    """As on a CPU that has no more: row arithmetic by our own choice, products by oneDNN's."""
    order = ["base", "v3", "v4"]
    if order.index(isa) > order.index(OPS.tile_isa()):
        pytest.skip(f"this CPU has {OPS.tile_isa()}")
    script = f"import test_cpp_rows as t; assert t.OPS.tile_isa() == {isa!r}; t.check_functions(); t.check_operators()"
    environment = os.environ | {"LUFFY_KERNELS_ISA": isa, "ONEDNN_MAX_CPU_ISA": products}
    result = subprocess.run([sys.executable, "-c", script], env=environment, cwd=HERE, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_unknown_instruction_set_is_named():
    environment = os.environ | {"LUFFY_KERNELS_ISA": "avx9"}
    script = "import luffy_kernels; luffy_kernels.status()"
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "LUFFY_KERNELS_ISA must be one of base" in result.stderr
    assert "got avx9" in result.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_nothing_depends_on_the_number_of_threads_or_on_the_run(dtype, options):
    head, results = problem(dtype, n=700), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            out, grads = outcome(linear_policy_loss, dtype, *head, backend="cpp", **OPTIONS[options])
            results.append((*out, *grads))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for mine, first in zip(other, results[0], strict=True):
            assert torch.equal(mine, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("v", "differ"), [(9001, {"span", "dh_width"}), (300, {"parts", "dh_width", "dw_width"})])
def test_many_threads_cut_the_work_otherwise_and_change_nothing(dtype, v, differ):
    """Spans of another length, tokens and H in parts: what the small heads of other tests never reach."""
    n, h, names = 200, 520, ("height", "pieces", "parts", "span", "groups", "dh_width", "dw_height", "dw_width")
    word = 2 if OPS.bf16_words(torch.empty(v, h, dtype=dtype)) else 4
    few, many = (dict(zip(names, OPS.head_plan(n, h, v, word, threads), strict=True)) for threads in (1, 12))
    assert {name for name in names if few[name] != many[name]} == differ
    assert v < 1000 or many["span"] < v
    head, results = problem(dtype, n, h, v), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 12):
            torch.set_num_threads(count)
            results.append(outcome(linear_policy_loss, dtype, *head, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    (first, grads), (other, others) = results
    for a, b in zip((*first, *grads), (*other, *others), strict=True):
        assert torch.equal(a, b)
    truth, exact = outcome(reference.linear_policy_loss, torch.float64, *head)
    torch.testing.assert_close(first.logp.double(), truth.logp, rtol=1e-5, atol=1e-5)
    for mine, want in zip(grads, exact, strict=True):
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(mine.double(), want, rtol=0, atol=bound * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_targets_too_unlikely_to_refer_to(dtype, options):
    """Exponentials relative to such a target leave fp32: their blocks are swept again with the maximum instead."""
    hidden, weight, targets, advantages = problem(dtype, n=200, spread=30.0)
    head = hidden, weight, targets, advantages
    out, grads = outcome(linear_policy_loss, dtype, *head, backend="cpp", **OPTIONS[options])
    truth, exact = outcome(reference.linear_policy_loss, torch.float64, *head, **OPTIONS[options])
    if options != "head":
        assert float(truth.logp.min()) < -100
        assert float(truth.logp.max()) > -60
    torch.testing.assert_close(out.logp.double(), truth.logp, rtol=1e-5, atol=1e-4)
    for mine, want in zip(grads, exact, strict=True):
        assert mine.isfinite().all()
        bound = 1e-4 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(mine.double(), want, rtol=0, atol=bound * float(want.abs().max()))


def test_a_sure_token_keeps_its_digits():
    """log p of p = 1 - 1e-11 and the gradient 1 - p: no other implementation in float32 has either."""
    logits = torch.tensor([[0.0, -25.0, -26.0, -30.0]])
    hidden, weight = torch.ones(1, 1, requires_grad=True), logits.T.contiguous().requires_grad_()
    logp = linear_logprobs(hidden, weight, torch.tensor([0]), backend="cpp").logp
    exact = logits.double().log_softmax(-1)[0, 0]
    torch.testing.assert_close(logp.double(), exact[None], rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(logp, weight)
    torch.testing.assert_close(grad[0, 0].double(), -torch.expm1(exact), rtol=1e-5, atol=0)


def test_the_workspace_does_not_grow_with_the_number_of_tokens():
    head = 64, 4099

    def largest(n):
        hidden, weight, targets, advantages = problem(torch.bfloat16, n, *head)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            outcome(linear_policy_loss, torch.bfloat16, hidden, weight, targets, advantages, backend="cpp")
        found = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(found)

    words = OPS.bf16_words(torch.empty(4099, 64, dtype=torch.bfloat16))
    assert largest(3000) == largest(15_000) <= 1024 * 4100 * (2 if words else 4)


def test_statistics_alone_keep_no_exponentials(monkeypatch):
    """Rows without a gradient cost one product and no buffer."""
    hidden, weight, targets, _ = problem(torch.bfloat16)
    monkeypatch.setattr(_cpp_rows.Workspace, "buffer", lambda self: pytest.fail("a buffer for nothing"))
    outcome_of = linear_policy_loss(
        hidden, weight, targets, advantages=torch.ones(len(targets)), losses=policy_gradient(), old_logp="current",
        normalizer=1.0, backend="cpp",
    )  # fmt: skip
    assert outcome_of.logp.any()
    hidden.requires_grad_()
    out = linear_policy_loss(
        hidden, weight, targets, advantages=0.0, losses=policy_gradient(), old_logp="current", normalizer=1.0,
        backend="cpp",
    )  # fmt: skip
    out.loss.backward()
    assert not hidden.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [5.0, 30.0, 60.0])
def test_label_smoothing_under_a_softcap(dtype, cap):
    """Each entry has a share of the gradient, however small its probability is."""
    hidden, weight, targets, _ = problem(dtype, n=64, h=64, v=257, spread=8.0)
    targets = (hidden.float() @ weight.float().T).argmax(-1)
    results = []
    for fn, kind in ((linear_cross_entropy, dtype), (reference.linear_cross_entropy, torch.float64)):
        leaves = [x.to(kind, copy=True).requires_grad_() for x in (8 * hidden, weight)]
        options = {"reduction": "sum", "label_smoothing": 0.1, "softcap": cap}
        options |= {} if kind == torch.float64 else {"backend": "cpp"}
        results.append(torch.autograd.grad(fn(*leaves, targets, **options), leaves))
    for mine, want in zip(*results, strict=True):
        bound = 1e-4 if dtype == torch.float32 else 2e-2  # the cap's slope, from E, loses digits near saturation
        torch.testing.assert_close(mine.double(), want, rtol=0, atol=bound * float(want.abs().max()))


@pytest.mark.parametrize("upstream", [1.0, 1e-6, 1e-10])
def test_a_far_target_and_a_small_upstream_keep_the_other_rows(upstream):
    """The factor of large exponentials is a bfloat16 operand: it must not vanish."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.tensor([[1.0, 0.5]]), torch.zeros(4096, 2)
    weight[:, 1] = 0.01 * torch.randn(4096, generator=rng)
    weight[7, 0] = -58.0
    leaves = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    grads = []
    for fn, (h, w), options in (
        (linear_logprobs, leaves, {"backend": "cpp"}),
        (reference.linear_logprobs, exact, {}),
    ):
        logp = fn(h, w, torch.tensor([7]), **options).logp
        grads.append(torch.autograd.grad((upstream * logp).sum(), w)[0].double())
    others = torch.arange(4096) != 7
    mine, want = (grad[others] for grad in grads)
    torch.testing.assert_close(mine, want, rtol=0, atol=1e-2 * float(want.abs().max()))


def test_a_large_softcap_is_no_softcap():
    hidden, weight, targets, _ = problem(torch.float32, spread=4.0)
    targets = targets.clamp(min=0)
    capped = linear_logprobs(hidden, weight, targets, softcap=1e5, backend="cpp").logp
    exact = reference.linear_logprobs(hidden.double(), weight.double(), targets, softcap=1e5).logp
    torch.testing.assert_close(capped.double(), exact, rtol=0, atol=1e-5)


def test_a_plan_of_nothing_is_refused():
    with pytest.raises(ValueError, match="head_plan: all sizes must be positive"):
        OPS.head_plan(0, 8, 8, 2, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("h", [896, 4096])
def test_a_large_hidden_size_costs_no_digits(dtype, h):
    """One fp32 sum over all of H is several times further off than a plain product, which splits it."""
    hidden, weight, targets, _ = problem(dtype, n=64, h=h, v=2000, spread=4.0)
    targets = targets.clamp(min=0)
    got = linear_logprobs(hidden, weight, targets, backend="cpp").logp.double()
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    plain = (hidden.float() @ weight.float().T).log_softmax(-1).gather(1, targets[:, None])[:, 0].double()
    error = (got - exact).abs().max()
    assert error < 1e-5
    assert error < 3 * (plain - exact).abs().max()
