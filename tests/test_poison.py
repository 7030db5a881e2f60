"""Every element is written and nothing is read before it is written: operators on uninitialised memory full of NaN."""

import pytest
import torch
from luffy_kernels import custom, linear_cross_entropy, linear_logprobs, linear_policy_loss
from test_policy_loss import FLAGS, problem, run


@pytest.fixture
def poisoned():
    """torch.empty gives NaN (the largest integer, True) from here on."""
    before = torch.are_deterministic_algorithms_enabled()

    def switch(on: bool) -> None:
        torch.use_deterministic_algorithms(on, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = on
        assert not on or torch.empty(1000).isnan().all()

    yield switch
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = True


def policy(backend, flags):
    case = problem(torch.bfloat16, FLAGS[flags])
    out, grads = run(linear_policy_loss, torch.bfloat16, *case, chunk_bytes=20_000, backend=backend)
    return (*out, *grads)


def with_custom(backend, flags):
    hidden, weight, targets, options = problem(torch.bfloat16, FLAGS[flags])
    options |= {"losses": custom(lambda logp, old, a: -a * logp.exp()), "loss_id": None}
    out, grads = run(
        linear_policy_loss, torch.bfloat16, hidden, weight, targets, options, chunk_bytes=20_000, backend=backend
    )
    return (*out, *grads)


def head_options(options):
    return {k: options[k] for k in ("bias", "temperature", "softcap", "logit_scale") if k in options}


def logprobs(backend, flags):
    hidden, weight, targets, options = problem(torch.bfloat16, FLAGS[flags])
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    out = linear_logprobs(
        *leaves, targets, return_entropy=True, chunk_bytes=20_000, backend=backend, **head_options(options)
    )
    return (*out, *torch.autograd.grad(sum((i + 1) * x.sum() for i, x in enumerate(out)), leaves))


def cross_entropy(backend, flags):
    hidden, weight, targets, options = problem(torch.bfloat16, FLAGS[flags])
    leaves, extra = (hidden.requires_grad_(), weight.requires_grad_()), {"label_smoothing": 0.1, "z_loss": 0.01}
    results = []
    for reduction in ("sum", "none"):
        loss = linear_cross_entropy(
            *leaves, targets, reduction=reduction, chunk_bytes=20_000, backend=backend, **extra, **head_options(options)
        )
        results += [loss, *torch.autograd.grad(loss.square().sum(), leaves)]
    return results


@pytest.mark.parametrize("flags", ["plain", "everything"])
@pytest.mark.parametrize("op", [policy, with_custom, logprobs, cross_entropy])
@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
def test_uninitialised_memory_reaches_no_result(poisoned, backend, op, flags):
    clean = op(backend, flags)
    poisoned(True)
    dirty = op(backend, flags)
    poisoned(False)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
