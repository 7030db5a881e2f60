"""The table of token losses: analytic gradients against autograd, clips, bounds, encoding."""

import math

import pytest
import torch
from luffy_kernels import behaviour_ratio, nll, policy_gradient, reference, shaped
from luffy_kernels.token_losses import COLUMNS, encode, evaluate

SPECS = {
    "policy_gradient": policy_gradient(),
    "clip": policy_gradient(0.2, 0.28),
    "clip_high": policy_gradient(clip_high=0.3),
    "dual_clip": policy_gradient(0.2, 0.2, 3.0),
    "shaped_prob": shaped(0.1),
    "shaped_old": shaped(0.3, "old"),
    "shaped_bounded": shaped(0.1, x_min=0.05, x_max=0.6),
    "behaviour_ratio": behaviour_ratio(),
    "behaviour_bounded": behaviour_ratio(1e-3, x_max=0.5),
    "nll": nll(),
    "p_max": policy_gradient(p_max=0.7),
    "nll_p_max": nll(p_max=0.7),
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
    want = reference.token_loss(spec, logp, advantages, old)
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
    for spec in (policy_gradient(0.2, 0.2), shaped(0.1, "old")):
        got = evaluate(logp, advantages, old, encode(spec).expand(3, -1))
        assert got.loss.isfinite().all()
        assert got.grad.isfinite().all()


def test_old_logp_is_read_only_where_it_matters():
    junk = torch.full((3,), math.nan)
    for spec in (shaped(), nll()):
        got = evaluate(torch.tensor([-1.0, -2.0, -3.0]), torch.ones(3), junk, encode(spec).expand(3, -1))
        assert got.loss.isfinite().all()
        assert (got.ratio == 1).all()


def test_encoding_is_one_row_per_spec():
    table = encode((policy_gradient(0.2), shaped(0.3), nll()))
    assert table.shape == (3, len(COLUMNS))
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
    ],
)
def test_bad_parameters(make, text):
    with pytest.raises(ValueError, match=text):
        make()
