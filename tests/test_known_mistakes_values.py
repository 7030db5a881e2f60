"""Mistakes that fused linear heads elsewhere shipped: those that make log-probs, entropies and losses wrong.

Thirty mistakes are numbered over three files; test_known_mistakes_gradients.py and ..._contracts.py hold the rest and
share the helpers here. Number 15, a vocabulary split over ranks, has tests/test_vocab_parallel.py to itself.
"""

import itertools
import math
from typing import NamedTuple

import luffy_kernels
import pytest
import torch
from luffy_kernels import linear_logprobs, linear_policy_loss, nll, policy_gradient, reference, shaped
from torch import Tensor
from torch.testing import assert_close

OPS = (
    "logprobs",
    "policy",
    "cross_entropy",
    "cross_entropy_rows",
)  # the last: reduction="none", with a backward of its own
BACKENDS = ("torch", "cpp", "triton")
PER_TOKEN = ("logprobs", "cross_entropy_rows")  # operators whose upstream gradient may differ from token to token
SLOW = ("triton",)  # interpreted on CPU: small sizes only, and bfloat16 is cut off there where a device rounds
V = 131  # odd, and no multiple of any tile


def pairs(*ops, fast=False):
    """(op, backend) of these operators, all by default; fast: without the slow backends."""
    return [(op, b) for op in ops or OPS for b in BACKENDS if not (fast and b in SLOW)]


def on(*ops, fast=False):
    """Parametrizes a test over `pairs`."""
    return pytest.mark.parametrize(("op", "backend"), pairs(*ops, fast=fast))


def make_head(n=13, h=16, v=V, dtype=torch.float32, spread=1.0):
    """(hidden, weight, targets) with logits of standard deviation `spread` and every fifth row ignored."""
    hidden, weight = torch.randn(n, h).to(dtype), (torch.randn(v, h) * spread * h**-0.5).to(dtype)
    targets = torch.randint(v, (n,))
    targets[::5] = -100
    return hidden, weight, targets


def unit(backend):
    """Relative error of one conversion to bfloat16."""
    return 2**-8 if backend in SLOW else 2**-9


def with_logits(logits):
    """hidden and weight whose product is exactly these [N, V] logits, in any precision and order of summation."""
    return torch.eye(logits.shape[0], dtype=logits.dtype), logits.T.contiguous()


class Tokens(NamedTuple):
    """Per-token numbers for a loss, in float64, the same for every backend."""

    advantages: Tensor
    old_logp: Tensor
    positive: Tensor
    upstream: Tensor
    loss_id: Tensor


def make_tokens(shape):
    rng = torch.Generator().manual_seed(1)
    flat = [torch.rand(shape, generator=rng, dtype=torch.float64) for _ in range(4)]
    return Tokens(2 * flat[0] - 1, -6 * flat[1], flat[2] + 0.5, 2 * flat[3] - 1, torch.randint(3, shape, generator=rng))


def forward(op, backend, hidden, weight, targets, *, token=None, **flags):
    """(scalar loss that weighs every token differently, per-token results by name). backend may be "reference"."""
    exact, token = backend == "reference", make_tokens(targets.shape) if token is None else token
    source = reference if exact else luffy_kernels
    if not exact:
        flags["backend"] = backend
    if op == "logprobs":
        out = source.linear_logprobs(hidden, weight, targets, **flags, **({} if exact else {"return_entropy": True}))
        weights = (token.upstream, token.advantages, 0.1 * token.positive)
        return sum((w * x).sum() for w, x in zip(weights, out[:3], strict=True)), out._asdict()
    if op == "policy":
        flags = {
            "advantages": token.advantages,
            "losses": (policy_gradient(0.2, 0.28), shaped(0.1), nll()),
            "loss_id": token.loss_id,
            "old_logp": token.old_logp,
            "entropy_coef": 0.1,
            "normalizer": 3.0,
        } | flags
        out = source.linear_policy_loss(hidden, weight, targets, **flags)
        return out.loss, {name: getattr(out, name) for name in ("logp", "entropy", "ratio", "kl")}
    if op == "cross_entropy":
        return source.linear_cross_entropy(hidden, weight, targets, **flags), {}
    rows = source.linear_cross_entropy(hidden, weight, targets, reduction="none", **flags)
    return (token.upstream * rows).sum(), {"nll": rows}


class Result(NamedTuple):
    loss: Tensor
    rows: dict[str, Tensor]
    grads: dict[str, Tensor]  # of hidden, weight and, where there is one, bias


def run(op, backend, head, *, backward=True, **flags):
    """`forward` and its gradients, from fresh leaves. The reference computes in float64 from the same numbers."""
    hidden, weight, targets = head
    leaves = {"hidden": hidden, "weight": weight} | ({"bias": flags.pop("bias")} if "bias" in flags else {})
    if backend == "reference":
        leaves = {k: x.double() for k, x in leaves.items()}
        flags = {k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in flags.items()}
        flags.pop("chunk_bytes", None)
    leaves = {k: x.detach().clone().requires_grad_(backward) for k, x in leaves.items()}
    loss, rows = forward(op, backend, **leaves, targets=targets, **flags)
    grads = torch.autograd.grad(loss, list(leaves.values())) if backward else ()
    return Result(loss.detach(), rows, dict(zip(leaves, grads, strict=backward)))


def check(op, backend, head, *, atol=1e-5, grad=1e-5, label="", **flags):
    """Compares with the reference: values within `atol`, gradients within `grad` (None: not asked for) of the largest.

    Returns the reference's result.
    """
    backward = grad is not None
    ours, truth = (run(op, b, head, backward=backward, **flags) for b in (backend, "reference"))

    def compare(name, mine, want, rtol, atol):
        assert_close(mine.detach().double(), want.detach(), rtol=rtol, atol=atol, msg=lambda m: f"{label}{name}: {m}")

    for name, want in truth.rows.items():
        compare(name, ours.rows[name], want, atol, atol)
    compare("loss", ours.loss, truth.loss, 10 * atol, 10 * atol)
    for name, want in truth.grads.items():
        compare(f"gradient of {name}", ours.grads[name], want, 0.0, grad * float(want.abs().max()) + 1e-12)
    return truth


@on()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabulary_tail_is_not_counted_as_logit_zero(op, backend, dtype):
    """Mistake 1 (verl#2656, verl#2899): lanes past the vocabulary's end enter the sum as logits of 0."""
    for v in (131, 515) if backend in SLOW else (131, 515, 50257, 129920, 151936, 152064):
        logits = torch.full((4, v), -15.0)
        logits[:2, 3] = 3.0
        logits[2:] = -100.0
        hidden, weight = with_logits(logits.to(dtype))  # exact in bfloat16
        head = hidden, weight, torch.tensor([3, v - 1, 0, v - 1])
        truth = check(op, backend, head, grad=None)
        if "logp" in truth.rows:  # and the oracle itself
            assert_close(truth.rows["logp"][2:], torch.full((2,), -math.log(v), dtype=torch.float64))
        if v <= 515:  # the weight's gradient is that of the logits; hidden's sums to 0 in the last rows
            ours, exact = (run(op, b, head).grads["weight"].double() for b in (backend, "reference"))
            # atol: 1 - p of a sure token, times a ratio of 400
            assert_close(ours, exact, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@on()
def test_running_maximum_does_not_start_at_zero(op, backend):
    """Mistake 2: a running maximum that starts at 0 underflows every exponential of very negative logits."""
    for v in (131, 515) if backend in SLOW else (131, 515, 4099):
        hidden, weight = with_logits(-100 - 200 * torch.rand(5, v))
        head = hidden, weight, torch.tensor([0, v - 1, v // 2, -100, 7])
        check(op, backend, head, grad=1e-5 if v <= 515 else None)


@on()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_narrow_operands_are_not_rounded(op, backend, dtype):
    """Mistake 6 (trl#4303): logits rounded to bfloat16 move log-probs by up to 0.06."""
    n, h, v = (5, 48, 131) if backend in SLOW else (16, 1024, 1031)
    check(op, backend, make_head(n, h, v, dtype, spread=8.0), atol=1e-4, grad=None)  # logits up to 30


@pytest.mark.slow
@on("logprobs", fast=True)
def test_logits_beyond_two_to_the_31(op, backend):
    """Mistake 11 (cce#37, trl#7266): 32-bit offsets into [N, V] wrap."""
    n, v = 70_000, 32_003
    hidden, weight, targets = torch.randn(n, 2), torch.randn(v, 2), torch.randint(v, (n,))
    with torch.no_grad():
        got = linear_logprobs(hidden, weight, targets, return_entropy=True, backend=backend)
    for few in (slice(0, 3), slice(67_101, 67_105), slice(n - 3, n)):  # row 67,103 reaches 2^31
        want = reference.linear_logprobs(hidden[few].double(), weight.double(), targets[few])
        for mine, truth in zip(got, want, strict=True):
            assert_close(mine[few].double(), truth, rtol=0, atol=1e-5)


@on(fast=True)
def test_a_vocabulary_wider_than_two_to_the_18(op, backend):
    """Mistake 11 (fla#1082): a wide vocabulary too meets the limits of a grid or a block."""
    head = make_head(n=4, v=262_147)
    head[2][-2:] = torch.tensor([262_146, 131_072])
    check(op, backend, head, grad=None)


@on()
def test_labels_are_not_shifted_once_more(op, backend):
    """Mistake 14 (verl#6068, verl#6268): an operator that shifts labels itself breaks packed and aligned batches."""
    v, shape = 24, (2, 7)
    targets = torch.randperm(v)[:14].view(shape)
    hidden, weight = 40.0 * torch.eye(v)[targets], torch.eye(v)  # every row is sure of its own target
    loss, rows = forward(op, backend, hidden, weight, targets)
    surprise = rows.get("logp", rows.get("nll", loss))
    assert surprise.abs().max() < 1e-6
    check(op, backend, (hidden.roll(1, 1), weight, targets))


HEAD_FLAGS = {
    "bias": torch.linspace(-2, 2, V).roll(40),
    "temperature": 0.6,
    "softcap": 2.5,
    "logit_scale": 1.7,
}


@on()
def test_bias_scale_cap_and_temperature_apply_in_this_order(op, backend):
    """Mistake 19 (unsloth#11277, cce#52): a transform is left out, applied twice, or applied in another order."""
    hidden, weight, targets = make_head(n=6, spread=3.0)
    for count in (3, 4) if backend in SLOW else range(5):
        for names in itertools.combinations(HEAD_FLAGS, count):
            flags = {name: HEAD_FLAGS[name] for name in names}
            check(op, backend, (hidden, weight, targets), label=f"{names} ", **flags)
            z = hidden.double() @ weight.double().T  # and what the oracle computes, spelt out
            z = flags.get("logit_scale", 1.0) * (z + flags.get("bias", torch.zeros(V)).double())
            z = 2.5 * torch.tanh(z / 2.5) if "softcap" in flags else z
            z = z / flags.get("temperature", 1.0)
            oracle = run("logprobs", "reference", (hidden, weight, targets), **flags)
            assert_close(oracle.rows["lse"][1:5], z[1:5].logsumexp(-1))


def masked_bias(keep, v=V):
    """A bias that keeps the first `keep` entries of a vocabulary."""
    return torch.where(torch.arange(v) < keep, 0.5 * torch.randn(v), -math.inf)


@on()
def test_masked_vocabulary_entries_give_no_nan(op, backend):
    """Mistake 20 (trl#7221, skyrl#2259): 0 * -inf in the entropy, or in its gradient, is NaN."""
    keep = 70
    hidden, weight, targets = make_head(spread=3.0)
    targets = targets.clamp(max=keep - 1)
    bias = masked_bias(keep)
    ours = run(op, backend, (hidden, weight, targets), bias=bias)
    truth = run(op, "reference", (hidden, weight[:keep], targets), bias=bias[:keep])  # as if they did not exist
    assert_close(ours.loss.double(), truth.loss, rtol=1e-5, atol=1e-5)
    for name, want in truth.rows.items():
        assert_close(ours.rows[name].double(), want.detach(), rtol=1e-5, atol=1e-5)
    for name in ("weight", "bias"):
        assert not ours.grads[name][keep:].any()
        assert_close(ours.grads[name][:keep].double(), truth.grads[name], rtol=1e-5, atol=1e-5)
    assert_close(ours.grads["hidden"].double(), truth.grads["hidden"], rtol=1e-5, atol=1e-5)


@on()
def test_a_masked_entry_stays_masked_under_a_softcap(op, backend):
    """Mistake 20 again: the bias is documented to mask, and a softcap must not bring the entry back."""
    keep = 70
    hidden, weight, targets = make_head()
    targets, bias = targets.clamp(max=keep - 1), masked_bias(keep)
    ours = run(op, backend, (hidden, weight, targets), bias=bias, softcap=5.0)
    truth = run(op, "reference", (hidden, weight[:keep], targets), bias=bias[:keep], softcap=5.0)
    assert_close(ours.loss.double(), truth.loss, rtol=1e-5, atol=1e-5)


@on("logprobs", "policy")
def test_training_sees_the_distribution_that_was_sampled(op, backend):
    """Mistake 23 (trl#6789, verl#6240): samples come from a tempered, cut vocabulary, log-probs from the whole one."""
    n, keep = 6, 20
    hidden, weight, _ = make_head(n, spread=3.0)
    temperature, bias = make_tokens((n,)).positive, masked_bias(keep).clamp(max=0.0)
    logits = hidden.double() @ weight[:keep].double().T + bias[:keep].double()
    sampled = (logits / temperature[:, None]).log_softmax(-1)
    flags = {"temperature": temperature.float(), "bias": bias}
    total = torch.zeros(n)
    for token in range(keep):
        targets = torch.full((n,), token)
        if op == "policy":
            flags |= {"old_logp": sampled[:, token], "losses": policy_gradient(1e-4, 1e-4), "loss_id": None}
            out = linear_policy_loss(hidden, weight, targets, advantages=1.0, normalizer=1.0, backend=backend, **flags)
            assert_close(out.ratio, torch.ones(n), rtol=0, atol=1e-5)
            assert not out.clipped.any()
        else:
            out = linear_logprobs(hidden, weight, targets, backend=backend, **flags)
        assert_close(out.logp.double(), sampled[:, token], rtol=0, atol=1e-5)
        total += out.logp.exp()
    assert_close(total, torch.ones(n))


@on()
def test_temperature_of_each_token(op, backend):
    """Mistake 26 (verl#6110): one temperature serves the whole batch, whatever was asked for."""
    hidden, weight, targets = make_head(n=12)
    hidden, targets = hidden.view(3, 4, -1), targets.view(3, 4)
    each = make_tokens((3, 4)).positive.float()
    for temperature in (each, each[:, :1], each[:1]):
        check(op, backend, (hidden, weight, targets), temperature=temperature)
    if op != "cross_entropy":
        together = forward(op, backend, hidden, weight, targets, temperature=each)[1]
        for i, j in ((0, 1), (2, 3)):  # the same with a number
            at = slice(i, i + 1), slice(j, j + 1)
            alone = forward(op, backend, hidden[at], weight, targets[at], temperature=float(each[i, j]))[1]
            for name in {"logp", "entropy", "lse", "nll"} & together.keys():
                assert_close(together[name][at], alone[name], rtol=0, atol=1e-6)


@on()
@pytest.mark.parametrize("through", ["bias", "hidden"])
def test_a_large_common_offset_costs_no_digits(op, backend, through):
    """Mistake 28 (pytorch#195829): statistics of logits near 1e4 taken before they are centred."""
    n, offset = 7, 1e4
    # Multiples of 2^-9, which float32 still holds at 1e4: the logits are exact, and only what follows can lose digits.
    noise = torch.randint(-4096, 4096, (n, V)) / 512
    hidden, weight = with_logits(noise)
    flags = {"bias": torch.full((V,), offset)} if through == "bias" else {}
    if through == "hidden":
        hidden = torch.cat([hidden, torch.ones(n, 1)], 1)
        weight = torch.cat([weight, torch.full((V, 1), offset)], 1)
    targets = torch.randint(V, (n,))
    ours, truth = (run(op, b, (hidden, weight, targets), **flags) for b in (backend, "reference"))
    for name, want in truth.rows.items():
        # Except lse, which is near 1e4 itself and so is rounded to the spacing there, 2^-10.
        atol = 2**-10 if name == "lse" else 1e-5
        assert_close(ours.rows[name].double(), want.detach(), rtol=1e-5, atol=atol)
    if op != "logprobs":
        assert_close(ours.loss.double(), truth.loss, rtol=1e-5, atol=1e-5)
    exact = truth.grads["weight"]  # hidden's gradient is a sum that cancels times the offset
    assert_close(ours.grads["weight"].double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


@on("logprobs", "policy")
def test_a_large_offset_of_inexact_logits_costs_their_spacing_and_no_more(op, backend):
    """Mistake 28 again: logits that a GEMM rounds near 1e4 carry errors of 2^-10 each, and results a few of them."""
    hidden, weight, targets = make_head(h=15)
    hidden = torch.cat([hidden, torch.ones(len(hidden), 1)], 1)
    weight = torch.cat([weight, torch.full((V, 1), 1e4)], 1)
    ours, truth = (run(op, b, (hidden, weight, targets), backward=False) for b in (backend, "reference"))
    for name in ("logp", "entropy"):
        # Rounded when the offset is added and at most twice more, as vectorised sums meet: 3 spacings.
        assert_close(ours.rows[name].double(), truth.rows[name], rtol=0, atol=3 * 2**-10)
