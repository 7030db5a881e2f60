"""linear_policy_loss against the float64 reference: values, gradients, skipping, memory, contracts."""

import math

import pytest
import torch
from luffy_kernels import (
    _chunks,
    _cpp_rows,
    _native,
    _torch_rows,
    behaviour_ratio,
    cispo,
    custom,
    linear_logprobs,
    linear_policy_loss,
    log_prob,
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
)
from luffy_kernels.testing import assert_as_good_as

B, T, H, V = 2, 21, 32, 203
BACKENDS = ("torch", "cpp", "triton")
LOSSES = (
    policy_gradient(0.2, 0.28, 3.0),
    shaped(0.1),
    nll(),
    behaviour_ratio(),
    shaped(0.2, "old", x_max=3.0),
    shaped_relative(0.1, 0.2, 0.2),
    power(0.5),
    log_prob(0.1),
    prob_plus_log(0.1, "old", 0.2, 0.2),
    reinforce(),
    cispo(0.28),
    sapo(),
)
FLAGS = {
    "plain": {},
    "entropy": {"entropy_coef": 0.1},
    "kl_k1": {"kl_coef": 0.2, "kl_type": "k1"},
    "kl_k2": {"kl_coef": 0.2, "kl_type": "k2"},
    "kl_k3": {"kl_coef": 0.2},
    "token_coefs": {"entropy_coef": "token", "kl_coef": "token", "token_weight": "token"},
    "softcap": {"softcap": 4.0, "entropy_coef": 0.1},
    "head": {"bias": "bias", "temperature": "token", "logit_scale": 1.3},
    "current": {"old_logp": "current"},
    "everything": {
        "bias": "bias",
        "temperature": "token",
        "softcap": 4.0,
        "logit_scale": 1.3,
        "entropy_coef": "token",
        "kl_coef": "token",
        "token_weight": "token",
    },
}


def problem(dtype, flags=None, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=rng, dtype=torch.float64)

    hidden = torch.randn(B, T, H, generator=rng).to(dtype)
    weight = (torch.randn(V, H, generator=rng) * 0.3).to(dtype)
    targets = torch.randint(V, (B, T), generator=rng)
    targets[0, :4] = -100
    options = {
        "advantages": 4 * rand(B, T) - 2,
        "losses": LOSSES,
        "loss_id": torch.randint(len(LOSSES), (B, T), generator=rng),
        "old_logp": -6 * rand(B, T),
        "ref_logp": -6 * rand(B, T),
        "normalizer": 7.0,
    }
    options["advantages"][1, 5:9] = 0
    for name, value in (flags or {}).items():
        options[name] = rand(B, T) + 0.5 if value == "token" else value
    if options.get("bias") == "bias":
        options["bias"] = torch.randn(V, generator=rng).to(dtype)
    return hidden, weight, targets, options


def run(fn, dtype, hidden, weight, targets, options, **extra):
    """Result and gradients of fn with the operands in this dtype."""
    options = dict(options)
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
    if isinstance(options.get("bias"), torch.Tensor):
        options["bias"] = options["bias"].to(dtype, copy=True).requires_grad_()
        leaves.append(options["bias"])
    if fn is reference.linear_policy_loss and dtype != torch.float64:
        options = {
            k: x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x
            for k, x in options.items()
        }
    out = fn(leaves[0], leaves[1], targets, **options, **extra)
    return out, torch.autograd.grad(out.loss, leaves)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.float64),
        ("torch", torch.float32),
        ("torch", torch.bfloat16),
        ("triton", torch.float32),
        ("triton", torch.bfloat16),
        ("torch", torch.float16),
        ("triton", torch.float16),
    ],
)
def test_matches_float64(flags, backend, dtype):
    if dtype == torch.float16 and flags not in ("plain", "entropy", "current"):
        pytest.skip("the float16 baseline overflows")
    case = problem(dtype, FLAGS[flags])
    ours, grads = run(linear_policy_loss, dtype, *case, chunk_bytes=20_000, backend=backend)
    truth, exact = run(reference.linear_policy_loss, torch.float64, *case)
    _, plain = run(reference.linear_policy_loss, dtype, *case)
    # 1e-6 for float64: the table of losses holds its constants in float32.
    rtol = 2e-6 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 1e-4
    for name in ("logp", "entropy", "ratio", "kl"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(truth, name), rtol=rtol, atol=rtol, msg=name)
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=10 * rtol, atol=10 * rtol)
    for name, mine, baseline, wanted in zip(("hidden", "weight", "bias"), grads, plain, exact, strict=False):
        assert mine.dtype == dtype
        eps = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 5e-6)
        assert_as_good_as(mine, baseline, wanted, atol=eps * float(wanted.abs().max()), name=name)


# cispo holds the ratio constant: its gradient is not the slope of its value (compared with the reference instead)
@pytest.mark.parametrize("spec", [spec for spec in LOSSES if spec.name != "cispo"], ids=lambda spec: spec.name)
def test_gradcheck(spec):
    hidden, weight, targets, options = problem(torch.float64)
    hidden, targets = hidden[:, :3, :4].requires_grad_(), torch.tensor([[0, 5, 2], [3, -100, 1]])
    weight = weight[:6, :4].clone().requires_grad_()
    cut = {
        k: x[:, :3] if isinstance(x, torch.Tensor) else x for k, x in options.items() if k not in ("losses", "loss_id")
    }

    def fn(hidden, weight):
        return linear_policy_loss(hidden, weight, targets, losses=spec, entropy_coef=0.3, kl_coef=0.2, **cut).loss

    assert torch.autograd.gradcheck(fn, (hidden, weight))


# "current" holds the ratio at 1: no difference quotient sees the gradient that the reference test compares.
@pytest.mark.parametrize("flags", [name for name in FLAGS if name != "current"])
def test_gradcheck_under_every_flag(flags):
    hidden, weight, targets, options = problem(torch.float64, FLAGS[flags])
    smooth = [i for i, spec in enumerate(LOSSES) if spec.name not in ("policy_gradient", "cispo")]
    ids = torch.tensor(smooth)[torch.arange(12).remainder(len(smooth))].view(2, 6)
    cut = {k: x[:, 4:10] if isinstance(x, torch.Tensor) and x.ndim == 2 else x for k, x in options.items()}
    cut["loss_id"] = ids
    leaves = [hidden[:, 4:10, :4].requires_grad_(), weight[:7, :4].clone().requires_grad_()]
    bias = cut.pop("bias")[:7].clone().requires_grad_() if "bias" in cut else None

    def fn(hidden, weight, *bias):
        bias = bias[0] if bias else None
        return linear_policy_loss(hidden, weight, targets[:, 4:10] % 7, bias=bias, **cut).loss

    assert torch.autograd.gradcheck(fn, leaves if bias is None else [*leaves, bias], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flags", ["plain", "everything"])
def test_three_products_and_four_agree(flags, backend):
    """The fused loss against the same loss of differentiable log-probs, whose backward recomputes the logits."""
    hidden, weight, targets, options = problem(torch.float32, FLAGS[flags])
    options["ref_logp"] = options["old_logp"] = -3 * torch.rand(B, T)
    fused, grads = run(linear_policy_loss, torch.float32, hidden, weight, targets, options, backend=backend)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    head = {k: options[k] for k in ("temperature", "softcap", "logit_scale") if k in options}
    if "bias" in options:
        head["bias"] = options["bias"].clone().requires_grad_()
        leaves.append(head["bias"])
    found = linear_logprobs(*leaves[:2], targets, return_entropy=True, backend=backend, **head)
    valid = targets != -100
    terms = ("advantages", "losses", "old_logp", "ref_logp", "token_weight", "kl_coef")
    each = token_loss(found.logp, loss_id=options["loss_id"] * valid, **{k: options[k] for k in terms if k in options})
    each = each.loss - options.get("entropy_coef", 0.0) * found.entropy
    loss = torch.where(valid, each, 0.0).sum() / options["normalizer"]
    torch.testing.assert_close(fused.loss, loss.float(), rtol=1e-5, atol=1e-5)
    for mine, other in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def squared(logp, old_logp, advantages):
    """A loss that no table knows."""
    return advantages * (logp - old_logp).square() + 0.1 * logp.exp()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_custom_loss_among_built_in_ones(dtype, monkeypatch):
    hidden, weight, targets, options = problem(dtype, FLAGS["everything"])
    options |= {"losses": (*LOSSES, custom(squared, needs_old_logp=True))}
    options["loss_id"] = torch.where(torch.rand(B, T) < 0.5, options["loss_id"], len(LOSSES))
    products = []
    add = _chunks.Gradients.add
    monkeypatch.setattr(_chunks.Gradients, "add", lambda *a: (products.append(1), add(*a))[1])
    ours, grads = run(linear_policy_loss, dtype, hidden, weight, targets, options, backend="torch")
    assert products == [1]  # in the same sweep as the rest: 3 GEMMs
    truth, exact = run(reference.linear_policy_loss, torch.float64, hidden, weight, targets, options)
    _, plain = run(reference.linear_policy_loss, dtype, hidden, weight, targets, options)
    rtol = 2e-6 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=10 * rtol, atol=10 * rtol)
    torch.testing.assert_close(ours.ratio.double(), truth.ratio, rtol=rtol, atol=rtol)
    for mine, baseline, wanted in zip(grads, plain, exact, strict=True):
        eps = 2**-7 if dtype == torch.bfloat16 else 5e-6
        assert_as_good_as(mine, baseline, wanted, atol=eps * float(wanted.abs().max()))


def test_a_custom_loss_without_old_logp_gradchecks():
    hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    targets = torch.tensor([0, -100, 3, 6, 2])
    focal = custom(lambda logp, old_logp, advantages: -((1 - logp.exp()) ** 2) * logp)

    def fn(hidden, weight):
        return linear_policy_loss(hidden, weight, targets, advantages=0.0, losses=focal, normalizer=2.0).loss

    assert torch.autograd.gradcheck(fn, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("p", [1e-3, 0.01, 0.1, 0.5])
def test_shaped_gradient_is_the_published_one(p):
    """d loss / d logits = -A gamma p / (p + gamma)^2 (onehot - softmax), read off with an identity head."""
    v, y, advantage, gamma = 11, 3, 1.7, 0.1
    logits = torch.randn(v, dtype=torch.float64)
    logits[y] = -math.inf
    logits[y] = logits.logsumexp(0) + math.log(p / (1 - p))
    hidden = logits[None].requires_grad_()
    eye = torch.eye(v, dtype=torch.float64)
    out = linear_policy_loss(hidden, eye, torch.tensor([y]), advantages=advantage, losses=shaped(gamma), normalizer=1.0)
    (grad,) = torch.autograd.grad(out.loss, hidden)
    onehot = torch.nn.functional.one_hot(torch.tensor(y), v)
    want = -advantage * gamma * p / (p + gamma) ** 2 * (onehot - logits.softmax(0))
    torch.testing.assert_close(grad[0], want.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_rows_leak_nothing(backend, dtype):
    hidden, weight, targets, options = problem(dtype, FLAGS["everything"])
    clean, want = run(linear_policy_loss, dtype, hidden, weight, targets, options, backend=backend)
    ignored = targets == -100
    hidden[ignored] = math.nan
    for name in ("advantages", "old_logp", "ref_logp", "token_weight", "entropy_coef"):
        options[name] = torch.where(ignored, math.nan, options[name])
    options["loss_id"] = torch.where(ignored, 99, options["loss_id"])
    dirty, got = run(linear_policy_loss, dtype, hidden, weight, targets, options, backend=backend)
    for a, b in zip((*clean, *want), (*dirty, *got), strict=True):
        assert torch.equal(a, b)
    assert not any(x[ignored].any() for x in dirty[1:])
    assert not got[0][ignored].any()


def test_dropping_rows_changes_nothing_but_the_work(monkeypatch):
    hidden, weight, targets, options = problem(torch.float64)
    seen = []
    add = _chunks.Gradients.add
    monkeypatch.setattr(_chunks.Gradients, "add", lambda s, dz, h, r, w: (seen.append(len(r)), add(s, dz, h, r, w)))
    out, grads = run(linear_policy_loss, torch.float64, hidden, weight, targets, options)
    valid = targets != -100
    live = valid & ~out.clipped & ((options["advantages"] != 0) | (options["loss_id"] == 2))
    assert sum(seen) == int(live.sum()) < int(valid.sum())
    _, exact = run(reference.linear_policy_loss, torch.float64, hidden, weight, targets, options)
    for mine, truth in zip(grads, exact, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("chunk_bytes", [None, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_are_all_clipped_have_a_loss_and_no_gradient(backend, dtype, chunk_bytes):
    if backend != "torch" and dtype == torch.float64:
        pytest.skip("the compiled kernels compute in float32")
    hidden, weight = torch.randn(4, 32).to(dtype).requires_grad_(), torch.randn(64, 32).to(dtype).requires_grad_()
    targets = torch.randint(64, (4,))
    old_logp = linear_logprobs(hidden, weight, targets).logp.detach() - 1
    out = linear_policy_loss(
        hidden, weight, targets, advantages=1.0, losses=policy_gradient(0.2, 0.28), old_logp=old_logp, normalizer=4.0,
        chunk_bytes=chunk_bytes, backend=backend,
    )  # fmt: skip
    out.loss.backward()
    assert out.clipped.all()
    torch.testing.assert_close(float(out.loss.detach()), -1.28)
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_float16_weight_gradients_add_up_beyond_float16():
    """A sum over rows may exceed 65,504 as long as what the normaliser leaves of it does not."""
    rows, width = 4000, 16
    hidden = torch.ones(rows, width, dtype=torch.float16)
    weight = torch.zeros(8, width, dtype=torch.float16, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)
    out = linear_policy_loss(hidden, weight, targets, advantages=30.0, losses=reinforce(), normalizer=1e5)
    (grad,) = torch.autograd.grad(out.loss, weight)
    torch.testing.assert_close(grad[0], torch.full((width,), -30 * rows * 7 / 8 / 1e5).half(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_gradient_error_does_not_grow_with_chunks(backend):
    n, h, v = 512, 32, 64
    hidden, weight = torch.randn(n, h).bfloat16(), torch.randn(v, h).bfloat16().requires_grad_()
    targets, advantages = torch.randint(v, (n,)), torch.rand(n)
    common = {"advantages": advantages, "losses": policy_gradient(), "old_logp": "current", "normalizer": 1.0}

    def error(chunk_bytes):
        out = linear_policy_loss(hidden, weight, targets, chunk_bytes=chunk_bytes, **common, backend=backend)
        (grad,) = torch.autograd.grad(out.loss, weight)
        return float((grad.double() - exact).norm() / exact.norm())

    wide = weight.detach().double().requires_grad_()
    options = common | {"advantages": advantages.double()}
    (exact,) = torch.autograd.grad(reference.linear_policy_loss(hidden.double(), wide, targets, **options).loss, wide)
    per_row = v * 10
    assert error(2 * per_row) <= 1.2 * error(n * per_row) + 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_output_and_retain_graph(backend):
    hidden, weight, targets, options = problem(torch.float32)
    hidden.requires_grad_()
    out = linear_policy_loss(hidden, weight, targets, **options, backend=backend)
    (once,) = torch.autograd.grad(out.loss, hidden, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * out.loss, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(out.loss, hidden)
    assert torch.equal(once, again)
    torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic(backend):
    case = problem(torch.bfloat16, FLAGS["everything"])
    first, second = (
        run(linear_policy_loss, torch.bfloat16, *case, chunk_bytes=20_000, backend=backend) for _ in range(2)
    )
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", [True, False], ids=["empty", "all_ignored"])
def test_nothing_to_train_on_is_zero_and_connected(backend, empty):
    hidden, weight, targets, options = problem(torch.float32, FLAGS["everything"])
    targets = torch.full_like(targets, -100)
    if empty:
        hidden, targets = hidden[:, :0], targets[:, :0]
        options = {k: x[:, :0] if isinstance(x, torch.Tensor) and x.ndim == 2 else x for k, x in options.items()}
    out, grads = run(linear_policy_loss, torch.float32, hidden, weight, targets, options, backend=backend)
    assert out.loss == 0
    assert out.logp.shape == targets.shape
    assert not any(grad.any() for grad in grads)


def test_only_the_gradients_that_are_asked_for(monkeypatch):
    hidden, weight, targets, options = problem(torch.float32)
    needs = []
    init = _chunks.Gradients.__init__
    monkeypatch.setattr(
        _chunks.Gradients, "__init__", lambda s, h, w, need: (needs.append(need), init(s, h, w, need))[1]
    )
    with torch.no_grad():
        assert not linear_policy_loss(hidden, weight.requires_grad_(), targets, **options).loss.requires_grad
    linear_policy_loss(hidden, weight.detach(), targets, **options)
    out = linear_policy_loss(hidden.requires_grad_(), weight.detach(), targets, **options)
    out.loss.backward()
    assert needs == [(False,) * 3, (False,) * 3, (True, False, False)]
    assert not any(x.requires_grad for x in out[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_broadcast_advantages_and_tensor_normalizer(backend):
    hidden, weight, targets, options = problem(torch.bfloat16)
    options |= {"advantages": torch.tensor([[1.0], [-1.0]]), "normalizer": torch.tensor(7.0)}
    hidden, weight = hidden.requires_grad_(), weight.float().requires_grad_()
    out = linear_policy_loss(hidden, weight, targets, **options, backend=backend)
    out.loss.backward()
    assert (hidden.grad.dtype, weight.grad.dtype, out.loss.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def make_chunks_head(dtype, v=100, softcap=None):
    return _chunks.make_head("test", torch.zeros(v, 4, dtype=dtype), None, torch.ones(()), softcap, 1.0, dtype, 1)


def test_workspace_follows_the_documented_formula():
    for (dtype, softcap), per_entry in {
        (torch.float32, None): 8,
        (torch.bfloat16, 1.0): 14,
        (torch.bfloat16, None): 10,
    }.items():
        head = make_chunks_head(dtype, softcap=softcap)
        assert _torch_rows.chunk_rows(head, 100 * per_entry * 7 + 99) == 7
        work = _torch_rows.Workspace(7, head)
        held = sum(x.nbytes for x in (work.logits, work.exp, work.narrow) if x is not None)
        assert held <= 100 * per_entry * 7
    assert _torch_rows.chunk_rows(head, 1) == 1
    assert [part.stop - part.start for part in _chunks.balanced(10, 4)] == [4, 4, 2]
    assert [part.stop - part.start for part in _chunks.balanced(300, 128)] == [128, 128, 44]  # whole blocks of 64


@pytest.mark.skipif(_native.error is not None, reason="the compiled library is not built")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_workspace_of_the_compiled_chunks_follows_the_documented_formula(dtype):
    head = make_chunks_head(dtype, 1001)
    size = 2 if torch.ops.luffy_kernels.bf16_words(head.weight) else 4
    for budget, rows in ((1, 64), (1001 * size * 200, 192), (1 << 40, 1024)):
        assert _cpp_rows.chunk_rows(head, budget) == rows
    assert _cpp_rows.Workspace(192, head).buffer().nbytes <= 192 * 1002 * size
    assert _cpp_rows.chunk_rows(head, 4 * 16 * 200, keep=False) == 192  # 1,001 entries are 4 tiles


@pytest.mark.parametrize("term", ["entropy", "uniform", "neither"])
@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float16, None), (torch.bfloat16, None), (torch.bfloat16, 3.0)])
def test_gradients_of_logits_need_no_buffer_but_the_workspace(dtype, softcap, term):
    """A torch operation that writes another dtype than it computes in would widen a copy of the whole chunk."""
    rows, size = 8, 20_000
    weight, hidden, targets = torch.randn(size, 4).to(dtype), torch.randn(rows, 4).to(dtype), torch.arange(rows)
    head = _chunks.make_head("test", weight, None, torch.ones(()), softcap, 1.0, dtype, rows)
    work, one = _torch_rows.Workspace(rows, head), torch.ones(rows)
    stats = _torch_rows.row_stats(hidden, targets, targets, head, work)
    u, uniform = one if term == "entropy" else None, one if term == "uniform" else None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        _torch_rows.logits_grad(stats, targets, targets, one, u, None, head, work, uniform)
    found = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    large = [size_ for size_ in found if size_ >= rows * size * 2]
    assert found
    assert len(large) == (0 if softcap is None else 1)  # the cap's derivative, which the formula counts


BAD = {
    "hidden": (lambda c: {"hidden": c["hidden"][..., :-1]}, r"hidden must be \[..., 32\]"),
    "targets_shape": (lambda c: {"targets": c["targets"][:, 1:]}, "targets must be"),
    "targets_dtype": (lambda c: {"targets": c["targets"].int()}, "targets must be int64"),
    "targets_range": (lambda c: {"targets": c["targets"] + V}, r"targets must be in \[0, 203\)"),
    "weight": (lambda c: {"weight": c["weight"].long()}, "weight must be bfloat16"),
    "bias": (lambda c: {"bias": torch.zeros(3)}, r"bias must be \[203\]"),
    "temperature": (lambda c: {"temperature": 0.0}, "temperature must be positive"),
    "softcap": (lambda c: {"softcap": 0.0}, "softcap must be positive"),
    "logit_scale": (lambda c: {"logit_scale": -1.0}, "logit_scale must be positive"),
    "normalizer": (lambda c: {"normalizer": 0.0}, "normalizer must be positive"),
    "normalizer_infinite": (lambda c: {"normalizer": math.inf}, "normalizer must be positive and finite"),
    "normalizer_word": (lambda c: {"normalizer": "8"}, "normalizer must be a number"),
    "temperature_word": (lambda c: {"temperature": "1"}, "temperature must be a number"),
    "temperature_infinite": (lambda c: {"temperature": math.inf}, "temperature must be positive and finite"),
    "loss_id_device": (lambda c: {"loss_id": c["loss_id"].to("meta")}, "loss_id must be on cpu, got meta"),
    "advantages_list": (lambda c: {"advantages": [1.0]}, "advantages must be a number or a tensor"),
    "normalizer_tensor": (lambda c: {"normalizer": torch.tensor(-1.0)}, "normalizer must be positive"),
    "advantages": (lambda c: {"advantages": torch.ones(B)}, "advantages must be broadcastable"),
    "old_logp": (lambda c: {"old_logp": None}, "old_logp must be given"),
    "old_logp_word": (lambda c: {"old_logp": "rollout"}, "old_logp must be a tensor or 'current'"),
    "ref_logp": (lambda c: {"ref_logp": None, "kl_coef": 0.1}, "ref_logp must be given"),
    "loss_id": (lambda c: {"loss_id": c["loss_id"] + len(LOSSES)}, r"loss_id must be in \[0, 12\)"),
    "loss_id_missing": (lambda c: {"loss_id": None}, "loss_id must be given"),
    "losses": (lambda c: {"losses": ()}, "losses must be"),
    "kl_type": (lambda c: {"kl_type": "k4"}, "kl_type must be one of"),
    "backend": (lambda c: {"backend": "cuda"}, "backend must be one of"),
    "backend_dtype": (lambda c: {"backend": "cpp", "hidden": c["hidden"].double()}, "float64 operands ask for more"),
    "chunk_bytes": (lambda c: {"chunk_bytes": 0}, "chunk_bytes must be positive"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_argument(case):
    hidden, weight, targets, options = problem(torch.float32)
    change, text = BAD[case]
    arguments = {"hidden": hidden, "weight": weight, "targets": targets} | options
    with pytest.raises(ValueError, match="linear_policy_loss: .*" + text):
        linear_policy_loss(**(arguments | change(arguments)))
