"""Mistakes that fused linear heads elsewhere shipped: those that break what a caller relies on.

Numbers and helpers as in test_known_mistakes_values.py.
"""

import itertools

import pytest
import torch
from luffy_kernels import (
    custom,
    linear_logprobs,
    nll,
    policy_gradient,
    reference,
    shaped,
    token_loss,
)
from test_known_mistakes_values import SLOW, V, check, forward, make_head, make_tokens, on, run, unit
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.testing import assert_close


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so that a result nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@on()
def test_nothing_is_left_uninitialised(op, backend, poisoned):
    """Mistake 12 (liger#1338): rows that are skipped keep whatever the allocator left there."""
    hidden, weight, targets = make_head()
    ours = run(op, backend, (hidden, weight, targets), chunk_bytes=1, bias=torch.randn(V))
    for values in (ours.loss, *ours.rows.values(), *ours.grads.values()):
        assert values.isfinite().all()
    for values in (*ours.rows.values(), ours.grads["hidden"]):
        assert not values[targets == -100].any()


@on()
def test_compiled_is_eager_bit_for_bit(op, backend, poisoned):
    """Mistake 12 (liger#1350, liger#1362): a graph break, a float64 scalar or a mutated input changes the result."""
    hidden, weight, targets = make_head()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    before, token = [(x.detach().clone(), x._version) for x in (*leaves, targets)], make_tokens((13,))

    def step(hidden, weight):
        loss, rows = forward(op, backend, hidden, weight, targets, token=token, temperature=0.7)
        return 0.3 * loss, rows

    torch._dynamo.reset()
    results = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss, rows = fn(*leaves)
        results.append([loss, *rows.values(), *torch.autograd.grad(loss, leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
        assert compiled.isfinite().all()
    for now, (then, version) in zip((*leaves, targets), before, strict=True):
        assert torch.equal(now, then)
        assert now._version == version


def test_bare_token_losses_compile_bit_for_bit(poisoned):
    """Mistake 12 again, in token_loss."""
    logp, token = -torch.rand(4, 5), make_tokens((4, 5))

    def step(logp):
        return token_loss(
            logp, advantages=token.advantages, losses=(policy_gradient(0.2), shaped(), nll()), loss_id=token.loss_id,
            old_logp=token.old_logp,
        ).loss.mean()  # fmt: skip

    torch._dynamo.reset()
    leaves = [logp.clone().requires_grad_() for _ in range(2)]
    step(leaves[0]).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(leaves[1]).backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@on()
@pytest.mark.parametrize("shape", [(0,), (3,), (2, 0)], ids=str)
def test_a_batch_without_tokens_is_zero_and_connected(op, backend, shape):
    """Mistake 13 (liger#177, torchtune#2341, trl#6859): NaN, an empty grid, or ranks that wait for a gradient."""
    hidden, (_, weight, _) = torch.full((*shape, 16), torch.nan), make_head()
    ours = run(op, backend, (hidden, weight, torch.full(shape, -100)), bias=torch.randn(V))
    assert ours.loss == 0
    for values in ours.rows.values():
        assert values.shape == shape
    assert ours.grads["hidden"].shape == hidden.shape
    for values in (*ours.rows.values(), *ours.grads.values()):
        assert not values.any()


def test_no_tokens_at_all_in_bare_token_losses():
    """Mistake 13 again, in token_loss."""
    logp = torch.zeros(0, requires_grad=True)
    token_loss(logp, advantages=1.0, losses=shaped()).loss.sum().backward()
    assert logp.grad.shape == (0,)


@pytest.fixture
def mesh():
    """One rank. A trainer that another test made may have left the process group it belongs to, and still use it."""
    already = torch.distributed.is_initialized()
    if not already:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    if not already:
        torch.distributed.destroy_process_group()


@on()
def test_a_sharded_weight_is_refused_with_a_way_out(op, backend, mesh):
    """Mistake 16 (cce#31, trl#6064, verl#1565): a shard is multiplied as if it were the weight."""
    hidden, weight, targets = make_head()
    sharded = distribute_tensor(weight, mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"weight must be unsharded .*full_tensor\(\).*DTensor"):
        forward(op, backend, hidden, sharded, targets)
    want = forward(op, backend, hidden, weight, targets)[0]
    assert torch.equal(forward(op, backend, hidden, sharded.full_tensor(), targets)[0], want)  # the way out


def clipped_ratio(logp, old_logp, advantages):
    """PPO's loss, as somebody would write it."""
    ratio = (logp - old_logp).exp()
    return -torch.minimum(advantages * ratio, advantages * ratio.clamp(0.8, 1.28))


@pytest.mark.parametrize("backend", ["auto", "torch"])  # what custom losses are documented to run on
def test_a_loss_of_ones_own_takes_part_in_everything(backend):
    """Mistake 22 (trl#7009, trl#6808): a loss inside the kernel shuts out what the trainer did with it."""
    mine = custom(clipped_ratio, needs_old_logp=True)
    token = make_tokens((13,))
    flags = {"token_weight": token.positive, "kl_coef": 0.1, "ref_logp": token.old_logp.flip(0), "temperature": 0.8}
    results = [
        run("policy", backend, head, losses=(loss, shaped(0.1), nll()), **flags)
        for head in [make_head()]
        for loss in (mine, policy_gradient(0.2, 0.28))
    ]
    assert_close(results[0].loss, results[1].loss, rtol=1e-6, atol=1e-6)
    assert_close(results[0].grads, results[1].grads, rtol=1e-5, atol=1e-6)


@on()
def test_auxiliary_losses_on_the_same_states_add_up(op, backend):
    """Mistake 22 again: a router's balance loss, a value head or a penalty on the same hidden states is dropped."""
    base, (_, weight, targets) = torch.randn(13, 16), make_head()

    def grads(backend, dtype):
        x, w = (t.to(dtype, copy=True).requires_grad_() for t in (base, weight))
        hidden = torch.tanh(x)
        loss = forward(op, backend, hidden, w, targets)[0]
        return torch.autograd.grad(loss + 0.3 * hidden.square().sum() + 0.01 * w.square().sum(), (x, w))

    for mine, want in zip(grads(backend, torch.float32), grads("reference", torch.float64), strict=True):
        assert_close(mine.double(), want, rtol=1e-5, atol=1e-5)


N, SHAPE = 12, (3, 4)
TOKENS = make_tokens((N,))
ANY_OP = {
    "bias": torch.linspace(-1, 1, V).roll(17),
    "temperature": TOKENS.positive.float(),
    "softcap": 2.0,
    "logit_scale": 1.4,
    "chunk_bytes": 1,
    "ignore_index": -1,
    "shape": SHAPE,
}
FLAGS = {
    "logprobs": ANY_OP,
    "policy": ANY_OP
    | {
        "entropy_coef": TOKENS.positive,
        "kl_coef": TOKENS.positive.flip(0),
        "kl_type": "k2",
        "token_weight": TOKENS.upstream,
        "old_logp": "current",
        "normalizer": torch.tensor(5.0),
    },
    "cross_entropy": ANY_OP | {"label_smoothing": 0.1, "z_loss": 0.02, "normalizer": torch.tensor(5.0)},
    "cross_entropy_rows": ANY_OP | {"label_smoothing": 0.1, "z_loss": 0.02},
}


@on()
def test_every_two_flags_go_together(op, backend):
    """Mistake 25 (verl#1720): each option works alone, and two of them fail or are quietly ignored."""
    hidden, weight, targets = make_head(N, spread=2.0)
    names = tuple(FLAGS[op])
    twos = itertools.pairwise(names) if backend in SLOW else itertools.combinations(names, 2)
    for chosen in (*twos, names):
        flags = {name: FLAGS[op][name] for name in chosen}
        if "kl_coef" in flags or "kl_type" in flags:
            flags = {"kl_coef": 0.2, "ref_logp": TOKENS.old_logp.roll(3)} | flags
        head = hidden, weight, targets
        if "ignore_index" in flags:
            head = hidden, weight, torch.where(targets == -100, -1, targets)
        if (shape := flags.pop("shape", None)) is not None:
            head = hidden.view(*shape, -1), weight, head[2].view(shape)
            flags = {k: x.view(shape) if torch.is_tensor(x) and x.shape == (N,) else x for k, x in flags.items()}
        check(op, backend, head, label=f"{chosen} ", **flags)


@on("logprobs")
def test_per_token_log_probs_serve_a_sequence_level_loss(op, backend):
    """Mistake 27 (liger#873): a kernel that returns its loss alone serves no loss that it does not know."""
    hidden, weight, targets = make_head(N)
    hidden, targets = hidden.view(*SHAPE, -1), targets.view(SHAPE)
    old, valid = make_tokens(SHAPE).old_logp, targets != -100
    advantages = torch.tensor([1.0, -0.7, 0.4])

    def sequence_loss(logp, old):
        """The ratio of a sequence is the geometric mean of its tokens' ratios."""
        ratio = (torch.where(valid, logp - old, 0.0).sum(1) / valid.sum(1)).exp()
        return -torch.minimum(advantages * ratio, advantages * ratio.clamp(0.1, 4.0)).mean()

    results = []
    for fn, dtype, flags in (
        (linear_logprobs, torch.float32, {"backend": backend}),
        (reference.linear_logprobs, torch.float64, {}),
    ):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        loss = sequence_loss(fn(*leaves, targets, **flags).logp, old.to(dtype))
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for mine, want in zip(*results, strict=True):
        assert want.any()
        assert_close(mine.double(), want, rtol=1e-5, atol=1e-6)
    # The same by the table of token losses, over one log-prob per sequence.
    logp = linear_logprobs(hidden, weight, targets, backend=backend).logp
    mean, old_mean = (torch.where(valid, x, 0.0).sum(1) / valid.sum(1) for x in (logp, old.float()))
    losses = token_loss(mean, advantages=advantages, losses=policy_gradient(0.9, 3.0), old_logp=old_mean).loss
    assert_close(losses.mean(), results[0][0].detach(), rtol=1e-5, atol=1e-6)


@on()
def test_rows_that_are_cut_out_are_rows_that_are_ignored(op, backend):
    """Mistake 27 again (verl#6511): a head over the responses alone must see what the whole batch would have given."""
    hidden, weight, targets = make_head(N)
    rows = (targets != -100).nonzero().view(-1)
    flags = (
        {"advantages": -0.5, "losses": shaped(0.1), "loss_id": None, "old_logp": "current"} if op == "policy" else {}
    )
    whole, part = (forward(op, backend, hidden[at], weight, targets[at], **flags) for at in (slice(None), rows))
    if op in ("policy", "cross_entropy"):
        assert_close(whole[0], part[0], rtol=1e-6, atol=1e-6)
    for name, values in part[1].items():
        assert_close(whole[1][name][rows], values, rtol=1e-6, atol=1e-6)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {F32: 1e-5, BF16: 2**-8, F16: 2**-10}


@on()
@pytest.mark.parametrize("dtypes", [(F32, BF16), (BF16, F32), (F16, F32), (BF16, F16), (BF16, BF16)], ids=str)
def test_mixed_dtypes_give_gradients_in_their_own(op, backend, dtypes):
    """Mistake 29 (liger#1324): a float32 master weight under bfloat16 states, its gradient rounded to theirs."""
    hidden, weight, targets = make_head()
    head, bias = (hidden.to(dtypes[0]), weight.to(dtypes[1]), targets), torch.randn(V)
    ours, truth = (run(op, b, head, bias=bias) for b in (backend, "reference"))
    mixed = dtypes[0] != dtypes[1]  # then products are made in float32, and only the results are rounded
    for name, dtype in zip(("hidden", "weight", "bias"), (*dtypes, F32), strict=True):
        want, mine = truth.grads[name], ours.grads[name]
        assert mine.dtype == dtype
        rounding = ROUNDING[dtype] if mixed else 4 * unit(backend)
        assert_close(mine.double(), want, rtol=0, atol=rounding * float(want.abs().max()))
    for name, want in truth.rows.items():
        assert ours.rows[name].dtype == F32
        assert_close(ours.rows[name].double(), want.detach(), rtol=1e-4, atol=1e-4)


@on()
@pytest.mark.parametrize("dtypes", [(BF16, F32), (BF16, BF16)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_autocast_changes_nothing(op, backend, dtypes, softcap):
    """Mistake 29 again: under autocast products that are promised in float32 are made in bfloat16, or fail."""
    hidden, weight, targets = make_head()
    leaves = hidden.to(dtypes[0]).requires_grad_(), weight.to(dtypes[1]).requires_grad_()
    results = []
    for inside in (False, True):
        with torch.autocast("cpu", dtype=BF16, enabled=inside):
            loss, rows = forward(op, backend, *leaves, targets, softcap=softcap)
        results.append((loss, rows, torch.autograd.grad(loss, leaves)))
    assert_close(results[1], results[0], rtol=0, atol=0)


NAMES = {"logprobs": "linear_logprobs", "policy": "linear_policy_loss"}


@on()
@pytest.mark.parametrize("bad", [-1, V, -101, 2**40])
def test_a_label_out_of_range_is_an_error(op, backend, bad, poisoned):
    """Mistake 30: a label that no lane matches leaves its log-prob as the allocator made it."""
    hidden, weight, targets = make_head()
    before = forward(op, backend, hidden, weight, targets)
    wrong = targets.clone()
    wrong[7] = bad
    text = f"{NAMES.get(op, 'linear_cross_entropy')}: targets must be in .0, {V}.* got {bad}"
    with pytest.raises(ValueError, match=text):
        forward(op, backend, hidden, weight, wrong)
    assert_close(forward(op, backend, hidden, weight, targets), before, rtol=0, atol=0)
    if bad == -1:  # what is ignored is what was said, and nothing else
        rows = torch.where(targets == -100, -1, targets)
        assert_close(forward(op, backend, hidden, weight, rows, ignore_index=-1), before, rtol=0, atol=0)
        with pytest.raises(ValueError, match="targets must be .* got -100"):
            forward(op, backend, hidden, weight, targets, ignore_index=-1)
