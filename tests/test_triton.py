"""What is Triton's own: the table on the device, dz over the logits, splits, and how the backend is chosen."""

import importlib.util
import re

import pytest
import torch
from bits import assert_same_bits
from luffy_kernels import (
    _chunks,
    _library,
    _policy_sweep,
    behaviour_ratio,
    cispo,
    cross_entropy,
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_loss,
    log_prob,
    logprobs,
    nll,
    policy_gradient,
    power,
    prob_plus_log,
    reinforce,
    sapo,
    shaped,
    shaped_relative,
    status,
    token_losses,
)

BOUNDED = (
    policy_gradient(),
    policy_gradient(0.2, 0.28, 3.0),
    policy_gradient(0.2, 0.2, p_max=0.6),
    power(0.5),
    power(2.0, "old", 0.3, 0.3, x_max=2.0),
    shaped(0.1),
    shaped(0.2, "old", clip_low=0.5, clip_high=0.1, x_min=0.5, x_max=1.5),
    shaped_relative(0.1, 0.2, 0.2),
    log_prob(0.3),
    log_prob(0.3, "old", x_min=0.5),
    prob_plus_log(0.1, "old", 0.2, 0.2),
    behaviour_ratio(1e-3, x_min=0.05, x_max=0.5),
    reinforce(),
    cispo(0.28),
    sapo(1.0, 1.5),
    nll(),
)


@pytest.mark.parametrize("spec", BOUNDED, ids=lambda s: f"{BOUNDED.index(s)}-{s.name}")
def test_every_kind_of_loss_is_the_tables(spec):
    """Through an identity head, so that a row's gradient is its own: all probabilities, ratios from 0 to e^20."""
    n, v = 96, 8
    logits = torch.randn(n, v) * torch.linspace(0.1, 5, n)[:, None]
    targets = torch.randint(v, (n,))
    options = {"advantages": torch.randn(n), "old_logp": -4 * torch.rand(n), "losses": spec, "normalizer": 1.0}
    options["advantages"][::9] = 0
    options["old_logp"][5], options["old_logp"][6] = -60.0, 0.0

    def outcome(backend):
        hidden = logits.clone().requires_grad_()
        out = linear_policy_loss(hidden, torch.eye(v), targets, backend=backend, **options)
        (grad,) = torch.autograd.grad(out.loss, hidden)
        return out, grad

    (mine, grad), (want, wanted) = outcome("triton"), outcome("torch")
    assert torch.equal(mine.clipped, want.clipped)
    for a, b in ((mine.ratio, want.ratio), (mine.loss, want.loss), (grad, wanted)):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("v", [1, 15, 16, 17, 127, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dz_over_the_logits_at_any_width(v, dtype):
    """One block and several, full and ragged: a store that overtook a load would corrupt what is read next."""
    hidden, weight = torch.randn(7, 24).to(dtype), torch.randn(v, 24).to(dtype)
    targets = torch.randint(v, (7,))
    options = {"advantages": torch.randn(7), "losses": shaped(), "normalizer": 1.0, "entropy_coef": 0.1}

    def grads(backend):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        return torch.autograd.grad(
            linear_policy_loss(*leaves, targets, backend=backend, chunk_bytes=4_000, **options).loss, leaves
        )

    eps = 1e-5 if dtype == torch.float32 else 2**-7
    for mine, want in zip(grads("triton"), grads("torch"), strict=True):
        torch.testing.assert_close(mine, want, rtol=0, atol=eps * max(1e-3, float(want.abs().max())))


def test_a_row_is_the_same_bits_in_any_batch():
    hidden, weight, targets = torch.randn(50, 40).bfloat16(), torch.randn(700, 40).bfloat16(), torch.randint(700, (50,))
    together = linear_logprobs(hidden, weight, targets, return_entropy=True, backend="triton")
    for rows in (slice(0, 1), slice(17, 18), slice(3, 40)):
        alone = linear_logprobs(hidden[rows], weight, targets[rows], return_entropy=True, backend="triton")
        for a, b in zip(together, alone, strict=True):
            assert_same_bits(a[rows], b)


@pytest.mark.parametrize("slices", [1, 3, 12])
def test_gradients_do_not_depend_on_the_slices_of_the_vocabulary(slices):
    hidden, weight, targets = torch.randn(20, 24), torch.randn(700, 24), torch.randint(700, (20,))
    upstream = torch.randn(20)

    def grads(chunk_bytes):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_logprobs(*leaves, targets, backend="triton", chunk_bytes=chunk_bytes)
        return torch.autograd.grad((out.logp * upstream).sum(), leaves)

    for mine, want in zip(grads(20 * 4 * 700 // slices), grads(1 << 30), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)


def everything(hidden, weight, targets, **options):
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    out = linear_logprobs(*leaves, targets, return_entropy=True, backend="triton", **options)
    grads = torch.autograd.grad((out.logp * torch.arange(len(targets))).sum() - 0.3 * out.entropy.sum(), leaves)
    return *(x.detach() for x in out), *grads


@pytest.fixture
def fetched(monkeypatch):
    """Says of each launch whether its operands came by descriptor; `fetched(True)` asks for that."""
    from luffy_kernels._triton import logprobs as kernels
    from luffy_kernels._triton import tuning

    ways, of = [], kernels.Operands.of.__func__

    def watched(cls, *arguments):
        made = of(cls, *arguments)
        ways.append(made.flags["TMA"])
        return made

    def ask(tma):
        ways.clear()
        for kernel in ("logprobs", "logprobs_backward"):
            row = tuning.TABLE[kernel, "interpreter", ""]
            monkeypatch.setitem(tuning.TABLE, (kernel, "interpreter", ""), row | {"TMA": tma})
        return ways

    monkeypatch.setattr(kernels.Operands, "of", classmethod(watched))
    return ask


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(("n", "h", "v"), [(37, 40, 139), (3, 8, 5), (64, 64, 320)])
def test_operands_by_descriptor_give_the_same_bits(fetched, n, h, v, ignored):
    """Sizes that are no multiples of a tile's: what a descriptor reads beyond a matrix is 0, and counts for nothing."""
    hidden, weight, targets = torch.randn(n, h).bfloat16(), torch.randn(v, h).bfloat16(), torch.randint(v, (n,))
    if ignored:
        targets[::3] = -100
        hidden[::3] = torch.nan
    options = {"bias": torch.randn(v), "chunk_bytes": 2_000}
    ways = fetched(False)
    want = everything(hidden, weight, targets, **options)
    assert not any(ways)
    ways = fetched(True)
    got = everything(hidden, weight, targets, **options)
    assert ways == [True, True]
    for mine, other in zip(got, want, strict=True):
        assert_same_bits(mine, other)


def test_a_weight_that_no_descriptor_can_be_made_of_is_read_by_pointer(fetched):
    n, h, v = 12, 40, 139
    hidden, weight, targets = torch.randn(n, h).bfloat16(), torch.randn(v, h).bfloat16(), torch.randint(v, (n,))
    want = everything(hidden, weight, targets)
    for odd in (weight.T.contiguous().T, weight[:, :-1].contiguous()):  # columns apart; rows of 78 bytes
        ways = fetched(True)
        got = everything(hidden[:, : odd.shape[1]], odd, targets)
        assert not any(ways)
        if odd.shape == weight.shape:
            for mine, other in zip(got, want, strict=True):
                assert_same_bits(mine, other)
    ways = fetched(True)
    wide = hidden.repeat_interleave(2, 1)[:, ::2]  # hidden that lies unfit is copied
    for mine, other in zip(everything(wide, weight, targets), want, strict=True):
        assert_same_bits(mine, other)
    assert all(ways)


def test_workspace_follows_the_documented_formula():
    rows = _library.row_kernels("triton")
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.zeros(100, 4, dtype=dtype)
        head = _chunks.make_head("test", weight, None, torch.ones(()), None, 1.0, dtype, 1)
        assert rows.chunk_rows(head, 4 * 112 * 7 + 99) == 7
        assert rows.chunk_rows(head, 1) == 1
        work = rows.workspace(7, head)
        assert work.logits.nbytes == 4 * 112 * 7
        assert work.dz.data_ptr() == work.logits.data_ptr()  # one buffer, not two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_saved_gradient_is_scaled_as_torch_scales_it(dtype):
    from luffy_kernels._triton.scaled import BLOCK, scaled

    factor = torch.tensor(0.37)
    strided = torch.randn(8, 6).T, torch.randn(9, 4)[:, 1:]
    for x in (torch.randn(3, 7), torch.randn(2, BLOCK + 5), torch.empty(0), *strided):
        before, got, want = x.clone(), scaled(x, factor, dtype), (x * factor).to(dtype)
        if dtype == torch.bfloat16:  # which the interpreter cuts off instead of rounding
            torch.testing.assert_close(got, want, rtol=2**-7, atol=0)
        else:
            assert torch.equal(got, want)
        assert torch.equal(x, before)


def test_a_machine_without_triton_says_so(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else found(name, *a))
    row = r"linear_policy_loss +\w+ +yes +(?:yes|no \(\d\)) +no \((\d)\)"
    assert re.search(row + r"(.|\n)*\n\(\1\) triton is not installed", status())
    with pytest.raises(ValueError, match=r"backend must be available \(triton is not installed\), got 'triton'"):
        linear_logprobs(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.int64), backend="triton")


def test_a_machine_without_a_device_never_interprets_by_itself(monkeypatch):
    cpu = torch.device("cpu")
    assert _library.resolve("linear_policy_loss", "auto", cpu, torch.bfloat16) != "triton"
    assert _library.resolve("linear_policy_loss", "auto", torch.device("cuda"), torch.bfloat16) == "triton"
    assert _library.resolve("linear_policy_loss", "auto", torch.device("cuda"), torch.float64) == "torch"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="it runs on cuda and rocm devices, not cpu"):
        _library.resolve("linear_policy_loss", "triton", cpu, torch.bfloat16)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_raises_on_cpu_is_nan_in_its_row_on_a_device(backend, monkeypatch):
    """Without the look at values, which would synchronise there: a bad row is NaN, the others are untouched."""
    for module in (_policy_sweep, logprobs, cross_entropy):
        monkeypatch.setattr(module, "check_head_values", lambda *a: None)
    table_index = token_losses.table_index
    monkeypatch.setattr(
        token_losses,
        "table_index",
        lambda op, ids, n, valid: torch.where(ids > 1, n, table_index(op, ids % 2, n, valid)),
    )
    hidden, weight, targets = torch.randn(12, 8), torch.randn(30, 8), torch.randint(30, (12,))
    ids = torch.randint(2, (12,))
    options = {"advantages": torch.ones(12), "losses": (shaped(), nll()), "normalizer": 1.0, "backend": backend}
    good = linear_policy_loss(hidden, weight, targets, loss_id=ids, **options)
    bad_targets, bad_ids = targets.clone(), ids.clone()
    bad_targets[3], bad_targets[5], bad_ids[7] = 30, -1, 9
    bad = linear_policy_loss(hidden, weight, bad_targets, loss_id=bad_ids, **options)
    touched = torch.zeros(12, dtype=torch.bool)
    touched[[3, 5]] = True
    assert bad.logp[touched].isnan().all()
    assert torch.equal(bad.logp[~touched], good.logp[~touched])
    assert bad.loss.isnan()
    one = linear_policy_loss(hidden, weight, targets, loss_id=bad_ids, **options)
    assert one.loss.isnan()
    assert torch.equal(one.logp, good.logp)
    cold = torch.ones(12)
    cold[3], cold[5] = 0.0, -1.0
    for chilled in (
        linear_logprobs(hidden, weight, targets, temperature=cold, backend=backend).logp,
        linear_policy_loss(hidden, weight, targets, loss_id=ids, temperature=cold, **options).logp,
    ):
        assert torch.equal(chilled.isnan(), touched)
    found = linear_logprobs(hidden, weight, bad_targets, backend=backend).logp
    assert torch.equal(found.isnan(), touched)
    each = linear_cross_entropy(hidden, weight, bad_targets, reduction="none", backend=backend)
    assert torch.equal(each.isnan(), touched)
