"""Vocabulary-parallel adapters on two ranks against the whole head in float64, and prime-rl's output linear."""

import pytest
import ranks
import torch
import torch.distributed as dist
from luffy_kernels.compat import prime_rl, skyrl, verl
from luffy_kernels.compat.megatron import ChunkedDistributedHiddenStatesToLogprobs, linear_cross_entropy
from luffy_kernels.compat.transformers import patch, unpatch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

S, B, H, V = 6, 3, 16, 40


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [S, B, H], weight [V, H], target [B, S], upstream [B, S]."""
    torch.manual_seed(3)
    hidden, weight = torch.randn(S, B, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    return hidden, weight, torch.randint(0, V, (B, S)), torch.randn(B, S, dtype=torch.float64)


def whole(hidden, weight, target, upstream):
    """Log-probs [B, S], dhidden, dweight."""
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    logp = (hidden.transpose(0, 1) @ weight.T).log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)
    return logp.detach(), *torch.autograd.grad((logp * upstream).sum(), (hidden, weight))


def part(rank: int, world: int, x: torch.Tensor) -> torch.Tensor:
    return x.chunk(world)[rank].clone().requires_grad_()


def nemo(rank, world):
    hidden, weight, target, upstream = case()
    logp, dh, dw = whole(hidden, weight, target, upstream)
    mine, shard = part(rank, world, hidden), part(rank, world, weight)
    size = V // world
    where = (rank * size, (rank + 1) * size, 2, dist.group.WORLD)
    found = ChunkedDistributedHiddenStatesToLogprobs.apply(mine, target, shard, *where)
    torch.testing.assert_close(found, logp)
    grads = torch.autograd.grad((found * upstream).sum(), (mine, shard))
    torch.testing.assert_close(grads, (dh.chunk(world)[rank], dw.chunk(world)[rank]))
    assert not ChunkedDistributedHiddenStatesToLogprobs.apply(mine, target, shard, *where, True).requires_grad


def skyrls(rank, world):
    hidden, weight, target, upstream = case()
    logp, dh, dw = whole(hidden, weight, target, upstream)
    mine, shard = hidden.transpose(0, 1).clone().requires_grad_(), part(rank, world, weight)
    size = V // world
    where = (rank * size, (rank + 1) * size, 2, dist.group.WORLD)
    found = skyrl.FusedLinearChunkedDistributedLogprob.apply(mine, shard, target, *where)
    torch.testing.assert_close(found, logp)
    share, grad = torch.autograd.grad((found * upstream).sum(), (mine, shard))
    torch.testing.assert_close(grad, dw.chunk(world)[rank])
    dist.all_reduce(share)  # as whoever gathered hidden does
    torch.testing.assert_close(share, dh.transpose(0, 1))


def verls(rank, world):
    """Its gradient of hidden is a share, which Megatron's gathering adds up."""
    hidden, weight, target, upstream = case()
    labels, up = target.T.contiguous(), upstream.T.reshape(-1)
    logp, dh, dw = whole(hidden, weight, target, upstream)
    mine, shard = hidden.clone().requires_grad_(), part(rank, world, weight)
    found, entropy = verl.linear_cross_entropy(mine, shard, labels, 1.0, "none", dist.group.WORLD)
    torch.testing.assert_close(found, logp.T.reshape(-1))
    log_p = (hidden @ weight.T).log_softmax(-1)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1).reshape(-1))
    share, grad = torch.autograd.grad((found * up).sum(), (mine, shard))
    torch.testing.assert_close(grad, dw.chunk(world)[rank])
    dist.all_reduce(share)
    torch.testing.assert_close(share, dh)


def megatrons(rank, world):
    hidden, weight, target, _ = case()
    labels = target.T.clone()  # [S, B], as hidden lies
    labels[2, 1] = 7
    for reduction in ("mean", "sum", "none"):
        for parallel in (False, True):
            full = [x.clone().requires_grad_() for x in (hidden, weight)]
            logits = (full[0] @ full[1].T).reshape(-1, V)
            truth = nn.functional.cross_entropy(logits, labels.reshape(-1), reduction=reduction, ignore_index=7)
            dh, dw = torch.autograd.grad(truth.square().sum(), full)
            mine = part(rank, world, hidden) if parallel else hidden.clone().requires_grad_()
            shard = part(rank, world, weight)
            found = linear_cross_entropy(mine, shard, labels, dist.group.WORLD, reduction, 7, parallel)
            torch.testing.assert_close(found, truth)
            grads = torch.autograd.grad(found.square().sum(), (mine, shard))
            torch.testing.assert_close(grads, (dh.chunk(world)[rank] if parallel else dh, dw.chunk(world)[rank]))


@pytest.mark.parametrize("semantics", [nemo, skyrls, verls, megatrons], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("world", [1, 2])
def test_ranks_have_what_one_would(semantics, world):
    ranks.run(world, semantics)


def sharded(rank, world, own_unit):
    """FSDP2 around a patched model, with a head of its own unit or not: one rank's loss and gradient."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("qwen2", vocab_size=96, num_key_value_heads=1, tie_word_embeddings=False, **sizes)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    ids = torch.randint(3, 96, (2, 9))
    own = model(ids, labels=ids).loss
    own.backward()
    expected = model.lm_head.weight.grad.clone()
    model.zero_grad()
    mesh = init_device_mesh("cpu", (world,))
    patch(model)
    if own_unit:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = model(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, own)
    torch.testing.assert_close(model.lm_head.weight.grad.full_tensor(), expected)
    with pytest.raises(ValueError, match="wrapped after it was patched"):
        unpatch(model)


@pytest.mark.parametrize("own_unit", [False, True])
def test_a_patched_model_under_fsdp(own_unit):
    ranks.run(2, sharded, own_unit)


def test_without_a_group():
    hidden, weight, target, upstream = case()
    logp, *_ = whole(hidden, weight, target, upstream)
    found = ChunkedDistributedHiddenStatesToLogprobs.apply(hidden, target, weight, 0, V, None, None)
    torch.testing.assert_close(found, logp)
    loss = linear_cross_entropy(hidden.transpose(0, 1), weight, target)
    torch.testing.assert_close(loss, -logp.mean())


class PublishedLinear(nn.Linear):
    """The constructor and forward of prime-rl 0.5's heads."""

    def __init__(self, in_features: int, out_features: int, chunk_size: int, softcap: float | None = None):
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size, self.softcap = chunk_size, softcap

    def forward(self, hidden_states, labels=None, temperature=None, sampling_mask=None):
        return "theirs"


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_prime_rls_output_linear(softcap):
    made = prime_rl.output_linear(PublishedLinear, dict)
    head = made(H, V, chunk_size=4, softcap=softcap).double()
    assert isinstance(head, PublishedLinear)
    assert made.__name__ == "PublishedLinear"
    hidden, _, labels, upstream = case()
    hidden = hidden.transpose(0, 1).clone().requires_grad_()
    temperature = torch.rand(B, S) + 0.5
    logits = hidden @ head.weight.T
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature.double()[..., None]
    log_p = logits.log_softmax(-1)
    right = log_p.gather(-1, labels[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
    found = head(hidden, labels, temperature)
    torch.testing.assert_close(found["logprobs"], right[0])
    torch.testing.assert_close(found["entropy"], right[1])
    leaves = (hidden, head.weight)
    grads = torch.autograd.grad((found["logprobs"] * upstream).sum() + found["entropy"].sum(), leaves)
    truth = torch.autograd.grad((right[0] * upstream).sum() + right[1].sum(), leaves)
    torch.testing.assert_close(grads, truth)
    assert head(hidden) == head(hidden, labels, temperature, sampling_mask=torch.ones(1)) == "theirs"


def test_a_head_of_another_kind_is_left():
    class Older(nn.Linear):
        def forward(self, hidden_states, labels=None):
            return labels

    with pytest.raises(AttributeError, match="Older.forward takes self, hidden_states, labels"):
        prime_rl.output_linear(Older, dict)


@pytest.mark.parametrize(("module", "package"), [(skyrl, "skyrl"), (prime_rl, "prime-rl")])
def test_adapters_ask_for_their_package(module, package):
    with pytest.raises(ImportError, match=f"{package} is not installed"):
        module.apply()
