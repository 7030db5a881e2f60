"""Mistakes that fused linear heads elsewhere shipped: those that make gradients wrong, or lose them.

Numbers and helpers as in test_known_mistakes_values.py.
"""

import functools

import pytest
import torch
from luffy_kernels import (
    linear_cross_entropy,
    linear_logprobs,
    nll,
    policy_gradient,
    reference,
    reinforce,
    shaped,
    token_loss,
)
from test_known_mistakes_values import PER_TOKEN, SLOW, V, check, forward, make_head, make_tokens, on, run, unit
from torch.testing import assert_close


def rows_of(op, backend, hidden, weight, targets, **flags):
    """Differentiable per-token results of an operator that has them."""
    if op == "logprobs":
        return linear_logprobs(hidden, weight, targets, backend=backend, **flags).logp
    return linear_cross_entropy(hidden, weight, targets, reduction="none", backend=backend, **flags)


def relative(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm())


@on(*PER_TOKEN)
def test_per_token_upstream_is_not_read_from_its_first_entry(op, backend):
    """Mistake 3 (liger#968, liger#1126): reduction="none" scales every gradient by grad_output[0]."""
    head = make_head()
    oracle = {
        "logprobs": lambda *a: reference.linear_logprobs(*a).logp,
        "cross_entropy_rows": functools.partial(reference.linear_cross_entropy, reduction="none"),
    }[op]
    for first in (0.0, 1.0, -3.0):
        upstream = torch.randn(13)
        upstream[:2], upstream[7] = first, 0.0  # row 0 is ignored, row 1 the first that counts
        results = []
        for fn, dtype in ((functools.partial(rows_of, op, backend), torch.float32), (oracle, torch.float64)):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in head[:2]]
            results.append(torch.autograd.grad(fn(*leaves, head[2]), leaves, upstream.to(dtype)))
        for mine, want in zip(*results, strict=True):
            assert_close(mine.double(), want, rtol=1e-5, atol=1e-5)


def test_upstream_of_bare_token_losses_may_be_uneven_and_strided():
    """Mistakes 3 and 10 again, in token_loss: an uneven upstream gradient, one of stride 0, a transposed one."""
    logp, token = -torch.rand(4, 5, dtype=torch.float64), make_tokens((4, 5))
    flags = {
        "advantages": token.advantages,
        "losses": (policy_gradient(0.2, 0.2), shaped(), reinforce()),
        "loss_id": token.loss_id,
        "old_logp": token.old_logp / 6,
    }
    for upstream in (token.upstream, torch.tensor(2.0).double().expand(4, 5), torch.randn(5, 4).double().T):
        mine, want = (logp.clone().requires_grad_() for _ in range(2))
        token_loss(mine, **flags).loss.backward(upstream)
        reference.token_loss(want, **flags).backward(upstream)
        assert_close(mine.grad, want.grad, rtol=1e-6, atol=1e-7)  # the table of losses holds float32


@on()
def test_weight_gradient_error_does_not_grow_with_the_number_of_chunks(op, backend):
    """Mistake 4 (liger#512, cce#14, olmo#370): bfloat16 sums over chunks lose what is small beside the total."""
    n = 48 if backend in SLOW else 512
    hidden, weight, targets = make_head(n, 16, 67, torch.bfloat16)
    head = hidden + 0.5, weight, targets  # terms of one sign: a total that outgrows them
    exact = run(op, "reference", head).grads["weight"]
    errors = [relative(run(op, backend, head, chunk_bytes=c).grads["weight"], exact) for c in (1 << 20, 1)]
    assert errors[1] <= 1.5 * errors[0]  # chunks of one row against one chunk
    assert errors[1] <= 1.5 * unit(backend)  # dz is rounded, and then the result


@on()
def test_hidden_gradient_error_does_not_grow_with_the_vocabulary(op, backend):
    """Mistake 5 (megatron#2739): bfloat16 sums over slices of the vocabulary do the same to hidden's gradient."""
    for v in (67, 1031) if backend in SLOW else (67, 2039):
        hidden, weight, targets = make_head(12, 16, v, torch.bfloat16)
        head = hidden, weight, targets
        exact = run(op, "reference", head).grads["hidden"]
        for chunk_bytes in (1 << 24, 1):
            assert relative(run(op, backend, head, chunk_bytes=chunk_bytes).grads["hidden"], exact) <= 1.5 * unit(
                backend
            )


@on()
def test_gradients_do_not_come_from_bfloat16_logits(op, backend):
    """Mistake 7 (liger#1432): probabilities of rounded logits are 4 to 23 % off, and so is what follows from them."""
    n, h = (5, 48) if backend in SLOW else (24, 256)
    head = make_head(n, h, dtype=torch.bfloat16, spread=8.0)  # logits up to 30
    ours, truth = (run(op, b, head).grads for b in (backend, "reference"))
    for name in ("hidden", "weight"):
        assert relative(ours[name], truth[name]) <= 1.5 * unit(backend)


@on()
def test_gradient_of_a_sure_token_does_not_cancel(op, backend):
    """Mistake 7 again: 1 - p of a token with p near 1 is garbage where p was stored in bfloat16."""
    logits = torch.randn(8, V) / 4
    targets = torch.randint(V, (8,))
    logits[torch.arange(8), targets] = 12.0  # 1 - p is near 1e-3, which bfloat16 cannot tell from 0 beside 1
    head = torch.eye(8).bfloat16(), logits.T.bfloat16().contiguous(), targets
    flags = {"losses": nll(), "loss_id": None, "entropy_coef": 0.0} if op == "policy" else {}
    ours, truth = (run(op, b, head, **flags).grads["weight"] for b in (backend, "reference"))
    rows = torch.arange(8)
    assert_close(ours[targets, rows].double(), truth[targets, rows], rtol=2**-7, atol=0)


LAYOUTS = {  # of [3, 4, 16] hidden states: the parameter they are cut from, and how
    "batched": ((3, 4, 16), lambda x: x),
    "transposed": ((4, 3, 16), lambda x: x.transpose(0, 1)),
    "sliced": ((3, 6, 16), lambda x: x[:, 1:-1]),
    "every_other_row": ((6, 4, 16), lambda x: x[::2]),
    "some_features": ((3, 4, 40), lambda x: x[..., 3:19]),
    "features_first": ((16, 3, 4), lambda x: x.permute(1, 2, 0)),
    "stride_0": ((1, 4, 16), lambda x: x.expand(3, 4, 16)),
}


@on()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_reaches_hidden_states_of_any_layout(op, backend, layout):
    """Mistake 8 (verl#6913, verl#7235): a copy made out of autograd's sight leaves the gradient None."""
    shape, cut = LAYOUTS[layout]
    base, (_, weight, targets) = torch.randn(shape).requires_grad_(), make_head(12)
    targets = targets.view(3, 4)
    forward(op, backend, cut(base), weight, targets)[0].backward()
    flat = cut(base.detach()).contiguous().requires_grad_()
    forward(op, backend, flat, weight, targets)[0].backward()
    (want,) = torch.autograd.grad(cut(base), base, flat.grad)
    assert base.grad is not None
    assert_close(base.grad, want, rtol=1e-5, atol=1e-6)
    assert flat.grad.any()


@on()
@pytest.mark.parametrize("layout", ["transposed", "sliced", "every_other_row"])
def test_gradient_reaches_a_weight_of_any_layout(op, backend, layout):
    """Mistakes 8 and 10: the same for the weight, which arrives as W.t().contiguous().t() or cut from a larger one."""
    hidden, weight, targets = make_head(12)
    larger = {"transposed": weight.T.contiguous(), "sliced": torch.randn(V + 5, 16), "every_other_row": None}[layout]
    base = torch.randn(2 * V, 16) if larger is None else larger
    cut = {"transposed": lambda x: x.t(), "sliced": lambda x: x[2:-3], "every_other_row": lambda x: x[::2]}[layout]
    base.requires_grad_()
    forward(op, backend, hidden, cut(base), targets)[0].backward()
    flat = cut(base.detach()).contiguous().requires_grad_()
    forward(op, backend, hidden, flat, targets)[0].backward()
    (want,) = torch.autograd.grad(cut(base), base, flat.grad)
    assert_close(base.grad, want, rtol=1e-5, atol=1e-6)


@on(*PER_TOKEN)
def test_upstream_of_stride_0_and_other_strides(op, backend):
    """Mistake 10 (verl#6960, te#2734): .sum() and .expand() hand backward a gradient that is one number in memory."""
    hidden, weight, targets = make_head(12)

    def grads(upstream):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = rows_of(op, backend, *leaves, targets)
        return torch.autograd.grad(*((out.sum(), leaves) if upstream is None else (out, leaves, upstream)))

    for strided in (None, torch.tensor(2.0).expand(12), torch.randn(24)[::2], torch.randn(12, 3)[:, 1]):
        dense = torch.ones(12) if strided is None else strided.contiguous()
        for mine, want in zip(grads(strided), grads(dense), strict=True):
            assert torch.equal(mine, want)


@on()
def test_strided_targets_and_per_token_arguments(op, backend):
    """Mistake 10 again: packed batches hand over views of everything, not of hidden alone."""
    hidden, weight, targets = make_head(24)
    temperature = make_tokens((24,)).positive.float()
    flags = {"temperature": temperature[::2]}
    bias = torch.randn(V, 2)[:, 0]
    if op == "policy":
        flags |= {name: getattr(make_tokens((24,)), name)[::2] for name in ("advantages", "old_logp", "loss_id")}
        flags |= {"token_weight": torch.tensor([0.7]).expand(12)}
    views = hidden[::2], weight.t().contiguous().t(), targets[::2]
    dense = [x.contiguous() for x in views]
    got = forward(op, backend, *views, bias=bias, **flags)
    want = forward(op, backend, *dense, bias=bias.contiguous(), **{k: x.contiguous() for k, x in flags.items()})
    assert_close(got, want, rtol=1e-6, atol=1e-6)


def entropy_alone(op, backend, hidden, weight, targets):
    """A loss in which nothing but the entropy has a gradient."""
    if op == "logprobs":
        return forward(op, backend, hidden, weight, targets)[1]["entropy"].sum()
    flags = {"advantages": torch.zeros(targets.shape), "losses": policy_gradient(), "loss_id": None}
    return forward(op, backend, hidden, weight, targets, old_logp="current", **flags)[0]


@on("logprobs", "policy")
def test_entropy_has_a_gradient(op, backend):
    """Mistake 9 (trl#6625): an entropy bonus that is reported, and silently not differentiated."""
    hidden, weight, targets = make_head(spread=3.0)
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        results.append(torch.autograd.grad(entropy_alone(op, name, *leaves, targets), leaves))
    for mine, want in zip(*results, strict=True):
        assert want.any()
        assert_close(mine.double(), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    if backend == "torch":
        small = hidden[:3, :4].double().requires_grad_(), weight[:7, :4].double().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda *leaves: entropy_alone(op, backend, *leaves, torch.tensor([0, 2, -100])), small
        )


@on(fast=True)
def test_more_than_65535_rows(op, backend):
    """Mistake 11 (liger#1294): rows beyond 65,535 fall off a grid's second dimension."""
    head = make_head(90_000, 4, 37)  # 72,000 that count
    # A float32 GEMM sums 72,000 terms of the weight's gradient one after the other: an error of some 1e-5.
    check(op, backend, head, grad=2e-4)


@on(fast=True)
@pytest.mark.parametrize("v", [2049, 262_147])
def test_a_wide_vocabulary_trains(op, backend, v):
    """Mistake 11 again: what works for [3, 2048] logits and fails for [3, 2049] ones."""
    # 262,147 terms of hidden's gradient in one float32 sum
    check(op, backend, make_head(4, 16, v), grad=2e-4)


@on()
def test_a_composed_weight_trains_its_adapters(op, backend):
    """Mistake 17 (trl#4612, unsloth#9331): LoRA on the head is ignored when only the base weight is read."""
    hidden, weight, targets = make_head()
    factors = torch.randn(V, 3), torch.randn(3, 16) * 0.3  # B, A

    def grads(backend, dtype):
        b, a = (x.to(dtype, copy=True).requires_grad_() for x in factors)
        loss, _ = forward(op, backend, hidden.to(dtype), weight.to(dtype) + 2.0 * (b @ a), targets)
        return torch.autograd.grad(loss, (b, a))

    for mine, want in zip(grads(backend, torch.float32), grads("reference", torch.float64), strict=True):
        assert want.any()
        assert_close(mine.double(), want, rtol=0, atol=1e-5 * float(want.abs().max()))


@on()
@pytest.mark.parametrize("trained", [True, False])
def test_a_frozen_head_pays_for_no_weight_gradient(op, backend, trained):
    """Mistake 18 (prime#3011, liger#1441, liger#930): a [V, H] gradient that nobody asked for is made and dropped."""
    # The compiled chunks hold 64 rows at least and a span of the weight: less than a large one.
    v, h = (20_011, 512) if backend == "cpp" else (515, 48)
    hidden, weight, targets = make_head(6, h, v)
    weight.requires_grad_(trained)

    def step(hidden):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            loss, _ = forward(op, backend, hidden, weight, targets, chunk_bytes=1)
            if loss.requires_grad:
                loss.backward()
        return max(event.self_cpu_memory_usage for event in profile.events())

    largest = v * h * weight.element_size()  # float32 operands: nothing is widened or packed
    assert (step(hidden.requires_grad_()) >= largest) == trained
    with torch.no_grad():
        assert step(hidden) < largest / 2


@on("policy", "cross_entropy")
def test_micro_batches_with_one_normalizer_add_up(op, backend):
    """Mistake 21 (liger#1082, trl#5890, trl#6024): averages of averages, and gradients k times too large."""
    hidden, weight, targets = make_head(24)
    targets[6:11] = -100  # micro-batches with unequal counts
    token = make_tokens((24,))

    def step(parts):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        total = 0.0
        for at in parts:
            flags = {"normalizer": torch.tensor(17.0)}
            if op == "policy":
                flags |= {name: getattr(token, name)[at] for name in ("advantages", "old_logp", "loss_id")}
            loss, _ = forward(op, backend, leaves[0][at], leaves[1], targets[at], **flags)
            loss.backward()
            total += loss.detach()
        return total, leaves[0].grad, leaves[1].grad

    whole = step([slice(0, 24)])
    for size in (1, 6, 10):
        assert_close(step([slice(a, a + size) for a in range(0, 24, size)]), whole, rtol=1e-5, atol=1e-6)


@on()
def test_backward_scales_with_the_upstream_gradient(op, backend):
    """Mistake 24: backward returns the gradients that forward made and forgets what they are to be multiplied by."""
    hidden, weight, targets = make_head()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss, _ = forward(op, backend, *leaves, targets)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    for factor in (3.0, -0.5, 0.0, 65536.0):  # the last as a loss scaler does
        scaled = torch.autograd.grad(factor * loss, leaves, retain_graph=True)
        assert_close(scaled, tuple(factor * x for x in once), rtol=1e-6, atol=1e-6 * abs(factor))
    for again, first in zip(torch.autograd.grad(loss, leaves), once, strict=True):
        assert torch.equal(again, first)  # and what it keeps is not scaled in place
    for leaf in leaves:
        leaf.grad = None
    (3 * forward(op, backend, *leaves, targets)[0]).backward()
    assert_close(tuple(x.grad for x in leaves), tuple(3 * x for x in once), rtol=1e-6, atol=1e-6)
