"""A head whose vocabulary is spread over ranks, and one that FSDP2 shards: the same numbers as on one rank."""

import pytest
import ranks
import torch
import torch.distributed as dist
from luffy_kernels import (
    LinearHead,
    custom,
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_loss,
    policy_gradient,
    reference,
    shaped,
)
from test_policy_loss import FLAGS, LOSSES, V, problem
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

# Rows of the weight by rank: uneven, in no order, and one rank with nothing left once padding is cut off.
SHARDS = ((150, V), (0, 150), (V, V))
EXACT = {"rtol": 2e-6, "atol": 2e-7}  # float64 with float32 constants in the table
SINGLE = {"rtol": 2e-4, "atol": 2e-5}


def share(rank, weight, bias):
    """This rank's leaves and where they start."""
    first, last = SHARDS[rank]
    leaves = [weight[first:last].clone().requires_grad_()]
    if bias is not None:
        leaves.append(bias[first:last].clone().requires_grad_())
    return leaves, {"tp_group": dist.group.WORLD, "vocab_start": first}


def assert_same_bits_on_all_ranks(*tensors):
    for mine in tensors:
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine.contiguous())
        assert all(torch.equal(mine, x) for x in everyone)


def compare(rank, op, truth_of, case, dtype, tolerance, upstream, **options):
    """op on shards against the reference on the whole weight: results, dh, this rank's dW and db."""
    hidden, weight, targets, given = case
    given = dict(given)
    bias = given.pop("bias", None)
    whole = [x if x is None else x.double().requires_grad_() for x in (hidden, weight, bias)]
    truth = truth_of(whole[0], whole[1], targets, bias=whole[2], **given)
    exact = torch.autograd.grad(upstream(truth), [x for x in whole if x is not None])
    (shard, *rest), where = share(rank, weight.to(dtype), None if bias is None else bias.to(dtype))
    hidden = hidden.to(dtype).requires_grad_()
    out = op(hidden, shard, targets, bias=rest[0] if rest else None, **given, **where, **options)
    grads = torch.autograd.grad(upstream(out), [hidden, shard, *rest])
    first, last = SHARDS[rank]
    for mine, wanted in zip(grads, (exact[0], *(x[first:last] for x in exact[1:])), strict=True):
        largest = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(mine.double(), wanted, rtol=0, atol=tolerance["atol"] * max(1.0, largest))
    results = [out] if isinstance(out, torch.Tensor) else [x for x in out if x is not None]
    wanted = [truth] if isinstance(truth, torch.Tensor) else [x for x in truth if x is not None]
    for mine, exact_result in zip(results, wanted, strict=True):
        torch.testing.assert_close(mine.double(), exact_result.double(), **tolerance)
    assert_same_bits_on_all_ranks(grads[0], *(x.detach() for x in results))


def everything(rank, world, backend):
    dtype, tolerance = (torch.float64, EXACT) if backend == "torch" else (torch.float32, SINGLE)
    options = {"backend": backend, "chunk_bytes": 10_000}
    for flags in ("plain", "token_coefs", "softcap", "everything"):
        case = problem(torch.float64, FLAGS[flags])
        pick = linear_policy_loss, reference.linear_policy_loss, case, dtype, tolerance
        compare(rank, *pick, lambda out: 3 * out.loss, **options)
    hidden, weight, targets, given = problem(torch.float64, FLAGS["head"])
    given["losses"] = (*LOSSES[:-1], custom(lambda logp, old, a: -a * logp.exp()))
    case = hidden, weight, targets, given
    compare(rank, linear_policy_loss, reference.linear_policy_loss, case, dtype, tolerance, lambda o: o.loss, **options)

    head = {"bias": given["bias"], "temperature": given["temperature"], "softcap": 4.0, "logit_scale": 1.3}
    random = [torch.randn(targets.shape, dtype=torch.float64) for _ in range(3)]
    upstream = lambda out: sum((r.to(x.dtype) * x).sum() for r, x in zip(random, out[:3], strict=True))  # noqa: E731
    entropy = lambda *a, **k: linear_logprobs(*a, return_entropy=True, **k)  # noqa: E731
    case = hidden, weight, targets, head
    compare(rank, entropy, reference.linear_logprobs, case, dtype, tolerance, upstream, **options)

    smooth = head | {"label_smoothing": 0.1, "z_loss": 0.01}
    for reduction in ("mean", "none"):
        case = hidden, weight, targets, smooth | {"reduction": reduction}
        weigh = lambda x: x.sum() if x.ndim == 0 else (random[0].to(x.dtype) * x).sum()  # noqa: E731
        pick = linear_cross_entropy, reference.linear_cross_entropy, case, dtype, tolerance
        compare(rank, *pick, weigh, **options)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_every_operator_is_the_same_on_uneven_shards(backend):
    ranks.run(len(SHARDS), everything, backend)


def refusals(rank, world):
    hidden, weight, targets, given = problem(torch.float32)
    part = weight[rank * 100 : rank * 100 + 90]
    with pytest.raises(ValueError, match=r"linear_logprobs: vocab_start must be 90 for one of the ranks"):
        linear_logprobs(hidden, part, targets, tp_group=dist.group.WORLD, vocab_start=100 * rank)
    part = weight[rank * 100 : rank * 100 + 100]
    with pytest.raises(ValueError, match=r"linear_logprobs: targets must be in \[0, 200\)"):
        linear_logprobs(hidden, part, targets * 0 + 200, tp_group=dist.group.WORLD, vocab_start=100 * rank)
    with pytest.raises(ValueError, match=r"backend must be available \(it does not spread"):
        linear_logprobs(hidden, part, targets, tp_group=dist.group.WORLD, vocab_start=100 * rank, backend="cpp")


def test_shards_with_a_gap_are_refused():
    ranks.run(2, refusals)


def test_a_start_without_a_group_is_refused():
    hidden, weight, targets, given = problem(torch.float32)
    with pytest.raises(ValueError, match="linear_policy_loss: vocab_start must be 0 without tp_group"):
        linear_policy_loss(hidden, weight, targets, **given, vocab_start=7)
    with pytest.raises(ValueError, match="linear_policy_loss: tp_group must be a ProcessGroup"):
        linear_policy_loss(hidden, weight, targets, **given, tp_group="world")


def sharded_head(rank, world):
    torch.manual_seed(0)
    linear = nn.Linear(16, 37, bias=True)
    whole = {name: x.detach().clone() for name, x in linear.named_parameters()}
    head = LinearHead.of(linear, softcap=5.0)
    policy = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)
    fully_shard(head, mesh=init_device_mesh("cpu", (world,)), mp_policy=policy)
    head.set_gradient_divide_factor(1.0)
    head.set_force_sum_reduction_for_comms(True)

    hidden, targets = torch.randn(12, 16), torch.randint(37, (12,))
    terms = {"advantages": torch.randn(12), "losses": (policy_gradient(0.2), shaped()), "old_logp": "current"}
    terms["loss_id"] = torch.randint(2, (12,))
    mine = slice(rank * 6, rank * 6 + 6)
    cut = {k: x[mine] if isinstance(x, torch.Tensor) else x for k, x in terms.items()}
    with pytest.raises(ValueError, match="weight must be unsharded"):
        linear_policy_loss(hidden[mine], head.weight, targets[mine], **cut, normalizer=12.0)
    out = head(linear_policy_loss, hidden[mine], targets[mine], **cut, normalizer=12.0)
    out.loss.backward()

    leaves = [x.double().requires_grad_() for x in whole.values()]
    truth = reference.linear_policy_loss(
        hidden.double(), leaves[0], targets, bias=leaves[1], softcap=5.0, **terms, normalizer=12.0
    )
    for name, exact in zip(whole, torch.autograd.grad(truth.loss, leaves), strict=True):
        grad = getattr(head, name).grad.full_tensor()
        torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-6)


def test_fsdp2_unshards_the_head_module_when_it_runs():
    ranks.run(2, sharded_head)


def test_a_head_is_taken_from_a_plain_linear_layer_only():
    with pytest.raises(ValueError, match=r"linear must be a plain nn\.Linear, got Identity"):
        LinearHead.of(nn.Identity())
    linear = nn.Linear(4, 9, bias=False)
    assert LinearHead.of(linear).weight is linear.weight
