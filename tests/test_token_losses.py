"""The table of token losses: analytic gradients against autograd, clips, bounds, encoding."""

import dataclasses
import math

import pytest
import torch
from luffy_kernels import (
    behaviour_ratio,
    cispo,
    custom,
    log_prob,
    masked_weight,
    nll,
    policy_gradient,
    power,
    prob_plus_log,
    reference,
    reinforce,
    sapo,
    shaped,
    shaped_relative,
    token_loss,
    truncated_weight,
)
from luffy_kernels.token_losses import COLUMNS, encode, evaluate

SPECS = {
    "policy_gradient": policy_gradient(),
    "clip": policy_gradient(0.2, 0.28),
    "clip_high": policy_gradient(clip_high=0.3),
    "dual_clip": policy_gradient(0.2, 0.2, 3.0),
    "shaped_prob": shaped(0.1),
    "shaped_old": shaped(0.3, "old"),
    "shaped_bounded": shaped(0.1, x_min=0.05, x_max=0.6),
    "shaped_clipped": shaped(0.1, clip_low=0.4, clip_high=0.1),
    "shaped_relative": shaped_relative(0.1),
    "shaped_relative_clipped": shaped_relative(0.5, 0.2, 0.2),
    "square_root": power(0.5),
    "square": power(2.0, "old", 0.2, 0.2),
    "power_bounded": power(0.5, "old", x_min=0.3, x_max=2.0),
    "log_prob": log_prob(0.1),
    "log_ratio": log_prob(1.0, "old", 0.9, 0.2),
    "prob_plus_log": prob_plus_log(0.1),
    "ratio_plus_log": prob_plus_log(0.3, "old", 0.2, 0.2),
    "plus_log_bounded": prob_plus_log(0.1, x_min=0.05, x_max=0.6),
    "behaviour_ratio": behaviour_ratio(),
    "behaviour_bounded": behaviour_ratio(1e-3, x_max=0.5),
    "reinforce": reinforce(),
    "cispo": cispo(0.28),
    "sapo": sapo(1.0, 1.05),
    "nll": nll(),
    "p_max": policy_gradient(p_max=0.7),
    "nll_p_max": nll(p_max=0.7),
    "cispo_p_max": cispo(p_max=0.7),
}


def table_rows(spec, n):
    return encode(spec).double().expand(n, -1)


@pytest.mark.parametrize("name", SPECS)
def test_value_and_gradient_match_autograd(name):
    spec = SPECS[name]
    logp = (-4 * torch.rand(400, dtype=torch.float64)).requires_grad_()
    old = -4 * torch.rand(400, dtype=torch.float64)
    advantages = torch.randn(400, dtype=torch.float64)
    advantages[::9] = 0
    want = reference.one_loss(spec, logp, advantages, old)
    (slope,) = torch.autograd.grad(want.sum(), logp)
    got = evaluate(logp.detach(), advantages, old, table_rows(spec, 400))
    # The table is float32: constants such as 0.1 agree to 1e-8, and the loss to 1e-6.
    torch.testing.assert_close(got.loss, want.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.grad, slope, rtol=1e-6, atol=1e-6)
    assert not got.grad[got.clipped].any()


def test_clipped_is_where_the_clip_zeroed_the_gradient():
    r = torch.tensor([0.5, 0.5, 2.0, 2.0, 5.0, 2.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 0.0], dtype=torch.float64)
    old = torch.full((6,), -3.0, dtype=torch.float64)
    got = evaluate(old + r.log(), advantages, old, table_rows(policy_gradient(0.2, 0.2, 3.0), 6))
    assert got.clipped.tolist() == [False, True, True, False, True, False]
    torch.testing.assert_close(got.loss, torch.tensor([-0.5, 0.8, -1.2, 2.0, 3.0, 0.0], dtype=torch.float64))


def test_extreme_ratios_stay_finite():
    logp, old = torch.tensor([0.0, 0.0, -200.0]), torch.tensor([-200.0, -200.0, 0.0])
    advantages = torch.tensor([1.0, 0.0, 1.0])
    for spec in SPECS.values():
        got = evaluate(logp, advantages, old, encode(spec).expand(3, -1))
        assert got.loss.isfinite().all()
        assert got.grad.isfinite().all()


def test_old_logp_is_read_only_where_it_matters():
    junk = torch.full((3,), math.nan)
    for spec in (spec for spec in SPECS.values() if not spec.needs_old_logp):
        got = evaluate(torch.tensor([-1.0, -2.0, -3.0]), torch.ones(3), junk, encode(spec).expand(3, -1))
        assert got.loss.isfinite().all()
        assert (got.ratio == 1).all()


def test_encoding_is_one_row_per_spec():
    table = encode(tuple(SPECS.values()))
    assert table.shape == (len(SPECS), len(COLUMNS))
    assert table.dtype == torch.float32
    assert not table.isnan().any()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: shaped(0.0), "shaped: gamma must be positive"),
        (lambda: shaped(0.1, "teacher"), "shaped: ratio must be"),
        (lambda: policy_gradient(clip_low=-0.2), "policy_gradient: clip_low must be"),
        (lambda: policy_gradient(dual_clip=1.0), "policy_gradient: dual_clip must be"),
        (lambda: behaviour_ratio(-1.0), "behaviour_ratio: eps must be"),
        (lambda: power(0.0), "power: exponent must be"),
        (lambda: log_prob(1.0, "old", clip_high=0.0), "log_prob: clip_high must be"),
        (lambda: cispo(-0.1), "cispo: clip_high must be"),
        (lambda: sapo(0.0), "sapo: tau_positive must be"),
        (lambda: custom("x"), "custom: fn must be callable"),
        (lambda: truncated_weight(torch.zeros(1), torch.zeros(1), 0.0), "truncated_weight: cap must be"),
        (lambda: masked_weight(torch.zeros(1), torch.zeros(1), 2.0, 1.0), "masked_weight: 0 <= low < high"),
    ],
)
def test_bad_parameters(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_zero_advantage_is_an_exact_zero_whatever_the_ratio():
    logp, old = torch.tensor([-200.0, -1.0]), torch.tensor([0.0, -300.0])
    for name, spec in SPECS.items():
        if "nll" not in name:
            got = evaluate(logp, torch.zeros(2), old, encode(spec).expand(2, -1))
            assert not got.loss.any(), name
            assert not got.grad.any(), name


def everything(n=300):
    """Log-probs with every spec and a custom one among them, in one packed batch."""
    rng = torch.Generator().manual_seed(1)
    rand = lambda: torch.rand(n, generator=rng, dtype=torch.float64)  # noqa: E731
    square = custom(lambda logp, old_logp, advantages: advantages * (logp - old_logp).square(), needs_old_logp=True)
    specs = (*SPECS.values(), square)
    options = {
        "advantages": 4 * rand() - 2,
        "losses": specs,
        "loss_id": torch.randint(len(specs), (n,), generator=rng),
        "old_logp": -3 * rand(),
    }
    return -3 * rand(), options, {"ref_logp": -3 * rand(), "token_weight": rand(), "kl_coef": 0.3}


@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
def test_token_loss_is_the_references(kl_type):
    logp, options, extra = everything()
    ours, theirs = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    out = token_loss(ours, **options, **extra, kl_type=kl_type)
    want = extra["token_weight"] * reference.token_loss(theirs, **options)
    want = want + 0.3 * reference.kl_estimate(theirs, extra["ref_logp"], kl_type)
    torch.testing.assert_close(out.loss, want, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(len(logp), dtype=torch.float64)
    (got,) = torch.autograd.grad(out.loss, ours, upstream)
    (slope,) = torch.autograd.grad(want, theirs, upstream)
    torch.testing.assert_close(got, slope, rtol=1e-6, atol=1e-6)
    assert not out.ratio.requires_grad


def test_token_loss_keeps_the_shape_and_compiles():
    logp = -torch.rand(2, 5, requires_grad=True)
    options = {
        "advantages": torch.tensor([[1.0], [-1.0]]),
        "losses": policy_gradient(0.2),
        "old_logp": -torch.rand(2, 5),
    }
    want = token_loss(logp, **options)
    assert want.loss.shape == want.ratio.shape == want.clipped.shape == (2, 5)
    got = torch.compile(lambda x: token_loss(x, **options).loss, fullgraph=True, backend="aot_eager")(logp)
    assert torch.equal(got, want.loss)


def test_opcheck_token_loss():
    n = 6
    per_row = [torch.randn(n), -torch.rand(n), -torch.rand(n), torch.rand(n), torch.rand(n)]
    args = (-torch.rand(n, requires_grad=True), *per_row, encode((nll(), shaped())), torch.randint(2, (n,)), "k3")
    torch.library.opcheck(torch.ops.luffy_kernels.token_loss_torch.default, args)


def test_a_custom_loss_of_the_wrong_shape_is_refused():
    from luffy_kernels import linear_policy_loss

    bad = custom(lambda logp, old_logp, advantages: logp.sum())
    hidden, weight = torch.randn(3, 4), torch.randn(7, 4)
    with pytest.raises(ValueError, match="must return a tensor like logp"):
        linear_policy_loss(hidden, weight, torch.arange(3), advantages=1.0, losses=bad, normalizer=1.0)


def test_sampler_weights_truncate_and_mask():
    old, sampler = torch.tensor([0.0, 0.0, 0.0, math.nan]), torch.tensor([-2.0, 0.1, 3.0, -1.0])
    torch.testing.assert_close(truncated_weight(old, sampler), torch.tensor([2.0, math.exp(-0.1), math.exp(-3), 0.0]))
    torch.testing.assert_close(masked_weight(old, sampler), torch.tensor([0.0, math.exp(-0.1), 0.0, 0.0]))


# The published loss, in all its options: luffy's option name -> (on-policy spec, trace spec)
PUBLISHED = {
    "no_reshape": (policy_gradient(), power(1.0)),
    "logp": (log_prob(1.0, "old"), log_prob(0.1)),
    "p_logp": (prob_plus_log(0.1, "old"), prob_plus_log(0.1)),
    "square_root": (power(0.5, "old"), power(0.5)),
    "pow": (power(0.7, "old"), power(0.7)),
    "p_div_p": (shaped_relative(0.1), shaped(0.1)),
}


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_loss_and_its_aggregation(name, clip):
    """luffy_spec 5.1-5.3, written out again from its formulas: sum over rows / 8192, or a token mean."""
    rng = torch.Generator().manual_seed(3)
    logp = (-3 * torch.rand(4, 20, generator=rng, dtype=torch.float64)).requires_grad_()
    old, a = -3 * torch.rand(4, 20, generator=rng, dtype=torch.float64), torch.randn(4, 1, generator=rng).double()
    mask, prefix = torch.rand(4, 20, generator=rng) < 0.8, torch.arange(4)[:, None].expand(4, 20) == 3
    r, p, q, d = (logp - old).exp(), logp.exp(), old.exp(), logp - old
    f = lambda x: x / (x + 0.1)  # noqa: E731
    on = {
        "no_reshape": r,
        "logp": d,
        "p_logp": r + 0.1 * d,
        "square_root": r.sqrt(),
        "pow": r**0.7,
        "p_div_p": f(p) / f(q),
    }
    off = {
        "no_reshape": p,
        "logp": 0.1 * logp,
        "p_logp": p + 0.1 * logp,
        "square_root": p.sqrt(),
        "pow": p**0.7,
        "p_div_p": f(p),
    }
    surrogate = -a * on[name]
    if clip:
        surrogate = torch.maximum(surrogate, -a * on[name].clamp(1 - clip, 1 + clip))
    want = torch.where(mask, torch.where(prefix, -a * off[name], surrogate), 0.0)
    fresh, trace = PUBLISHED[name]
    fresh = dataclasses.replace(fresh, clip_low=clip or math.inf, clip_high=clip or math.inf)
    out = token_loss(logp, advantages=a, losses=(fresh, trace), loss_id=prefix.long(), old_logp=old)
    for divide in (8192.0, mask.sum()):
        ours, theirs = (out.loss * mask).sum() / divide, want.sum() / divide
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
        got, slope = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (ours, theirs))
        torch.testing.assert_close(got, slope, rtol=1e-6, atol=1e-9)
