"""Operators as torch sees them: opcheck, torch.compile, backends and status."""

import re

import pytest
import torch
from luffy_kernels import _native, custom, linear_logprobs, linear_policy_loss, policy_gradient, shaped, status

OPS = torch.ops.luffy_kernels


def head(n=9, h=8, v=21):
    return torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True), torch.randint(v, (n,))


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
def test_opcheck_logprobs(backend):
    hidden, weight, targets = head()
    args = (
        hidden,
        weight,
        torch.randn(21, requires_grad=True),
        targets,
        torch.ones(()),
        5.0,
        1.0,
        -100,
        None,
        0,
        10_000,
    )
    torch.library.opcheck(getattr(OPS, f"logprobs_{backend}").default, args)


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
def test_opcheck_policy_loss(backend):
    hidden, weight, targets = head()
    n = len(targets)
    table = torch.stack([torch.tensor(s.row()) for s in (policy_gradient(0.2), shaped())])
    per_token = [torch.randn(n), -torch.rand(n), -torch.rand(n), torch.rand(n), torch.rand(n), torch.rand(n)]
    args = (hidden, weight, None, targets, table, torch.randint(2, (n,)), *per_token, "k3", torch.ones(()), None, 1.0)
    torch.library.opcheck(
        getattr(OPS, f"policy_loss_{backend}").default, (*args, -100, None, 0, 10_000, [True, True, False])
    )


def test_compiles_into_one_graph():
    hidden, weight, targets = head()
    advantages = torch.randn(len(targets))

    def step(hidden, weight):
        out = linear_policy_loss(
            hidden, weight, targets, advantages=advantages, losses=shaped(), normalizer=3.0, entropy_coef=0.1
        )
        logp = linear_logprobs(hidden, weight, targets, temperature=0.7).logp
        return out.loss + logp.mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(step(hidden, weight), (hidden, weight))
    got = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_custom_loss_compiles_into_one_graph():
    """A schema takes no callables: the traced loss goes through log-probs, junk in ignored rows and all."""
    hidden, weight, targets = head()
    targets[0] = -100
    ids = torch.randint(2, (len(targets),))
    ids[0] = 99
    options = {"advantages": torch.randn(len(targets)), "loss_id": ids, "old_logp": -2 * torch.ones(len(targets))}
    options["advantages"][0] = torch.nan
    options |= {"ref_logp": -3 * torch.ones(len(targets)), "kl_coef": 0.2, "entropy_coef": 0.1, "normalizer": 3.0}
    options["losses"] = (custom(lambda logp, old, a: -a * (1 - logp.exp()) ** 2 * logp), policy_gradient(0.2))

    def step(hidden, weight):
        return linear_policy_loss(hidden, weight, targets, **options)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    want, got = step(hidden, weight), compiled(hidden, weight)
    want_grads = torch.autograd.grad(want.loss, (hidden, weight))
    got_grads = torch.autograd.grad(got.loss, (hidden, weight))
    for a, b in zip((*want, *want_grads), (*got, *got_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_unavailable_backend_says_why(monkeypatch):
    hidden, weight, targets = head()
    with pytest.raises(ValueError, match="linear_logprobs: backend must be available .*float64"):
        linear_logprobs(hidden.double(), weight.double(), targets, backend="cpp")
    monkeypatch.setattr(_native, "error", "no compiler was found")
    with pytest.raises(ValueError, match="linear_logprobs: backend must be available .*no compiler"):
        linear_logprobs(hidden, weight, targets, backend="cpp")
    assert re.search(r"linear_logprobs +torch +yes +no \((\d)\)(.|\n)*\n\(\1\) no compiler was found", status())
    assert linear_logprobs(hidden, weight, targets).logp.isfinite().all()


def test_torch_backend_without_the_compiled_library(monkeypatch):
    """bfloat16 logits stay float32-exact through the upcast path."""
    hidden, weight, targets = head()
    hidden, weight = hidden.detach().bfloat16(), weight.detach().bfloat16()
    with_library = linear_logprobs(hidden, weight, targets, backend="torch").logp
    monkeypatch.setattr(_native, "error", "gone")
    torch.testing.assert_close(linear_logprobs(hidden, weight, targets).logp, with_library, rtol=0, atol=1e-5)


def test_a_sharded_weight_is_refused():
    hidden, weight, targets = head()
    weight = weight.detach()
    weight.placements = ("Shard(0)",)  # what tells a DTensor from a tensor
    with pytest.raises(ValueError, match="weight must be unsharded"):
        linear_logprobs(hidden, weight, targets)
