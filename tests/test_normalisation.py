"""One update is one update, however ranks and micro-batches split it: loss, gradients and weights after a step."""

import math
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file
from test_packing import group, tiny_lm

from luffy import activations, distributed, lora, sequence
from luffy.config import Config, MeshConfig
from luffy.groups import Group
from luffy.model import Policy, shard
from luffy.objectives import make_objective
from luffy.setup import Trainer
from luffy.shards import full
from luffy.train import split, update

ENTROPY, NORMALIZER, GAMMA = 0.05, 10.0, 0.1


class Recording(torch.optim.AdamW):
    """AdamW that keeps the gradients it was given."""

    def step(self, closure=None):
        self.seen = [full(p.grad).clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def uneven() -> list[Group]:
    """Rows of 1 to 41 tokens, a trace in every second group, a group without a gradient."""
    generator = torch.Generator().manual_seed(1)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 97, (n,), generator=generator).tolist())

    made = []
    for index, lengths in enumerate([(1, 7, 20), (41, 3, 5), (2, 2, 9, 13), (6, 4), (8, 5, 11)]):
        item = group(tokens(3 + 2 * index), *map(tokens, lengths))
        for n, row in enumerate(item.rows):
            row.reward = float(n % 2 and index < 4)  # the last group is all wrong: no advantage, yet it counts
            row.sampler_logp = (-1.0,) * len(row.token_ids)
        if index % 2 == 0:
            item.rows[-1].is_trace, item.rows[-1].sampler_logp = True, ()
        made.append(item)
    return made


def few() -> list[Group]:
    """One group of two rows: most of four ranks have nothing."""
    item = group((5, 6, 7), (10, 11, 12, 2), (13, 2))
    item.rows[0].reward = 1.0
    return [item]


# Name -> the groups, what their loss is divided by, the weight of the entropy: with 0 some rows never enter the model.
BATCHES = {
    "uneven": (uneven, NORMALIZER, ENTROPY),
    "few": (few, NORMALIZER, ENTROPY),
    "by tokens": (uneven, "tokens", 0.0),
    "by sequences": (uneven, "sequences", 0.0),
    "clipped": (uneven, NORMALIZER, ENTROPY),
    "little memory": (uneven, NORMALIZER, ENTROPY),
    "adapters": (uneven, NORMALIZER, ENTROPY),
}


def configure(name: str, config: Config) -> None:
    """What is special about a batch."""
    if name == "clipped":  # the second and third update clip, and the gradient's norm is clipped too
        config.train.prompts_per_step, config.train.updates_per_step = 5, 5
        config.objective.clip_low = config.objective.clip_high = 0.02
        config.optim.max_grad_norm, config.optim.lr = 0.05, 3e-3
    if name == "little memory":
        config.model.gradient_checkpointing, config.model.mlp_tokens = True, 3
        config.model.offload_activations = True
    if name == "adapters":
        config.model.lora.rank, config.model.gradient_checkpointing = 2, "selective"


def make_lm(config: Config):
    lm = tiny_lm().train()
    if config.model.lora.rank is not None:
        lora.adapt(lm, config.model.lora, torch.float32, "tiny")
        for number, adapter in enumerate(lora.adapters_of(lm).values()):  # B = 0 would give A no gradient
            torch.nn.init.normal_(adapter, std=0.1, generator=torch.Generator().manual_seed(number))
    activations.apply(lm, config.model)
    return lm


def one_update(name: str, mesh: MeshConfig, budget: int) -> dict[str, torch.Tensor]:
    """Loss, gradient norm, gradients and weights of `luffy.train.update` on this mesh."""
    config = Config()
    make, config.objective.normalizer, config.objective.entropy_coef = BATCHES[name]
    batch = make()
    config.objective.gamma = GAMMA
    config.optim.max_grad_norm, config.optim.lr, config.train.tokens_per_micro = 1e9, 1e-3, budget
    configure(name, config)
    world = distributed.start(mesh)
    policy = Policy(make_lm(config), 1.0, config.model.offload_activations)
    if world.size > 1:
        sequence.check_heads(policy.lm.config, world.sequence_ranks)
        policy = shard(policy, world.params, torch.float32)
    trained = dict(filter(lambda named: named[1].requires_grad, policy.named_parameters()))
    optimizer = Recording(trained.values(), eps=1e-4)
    t = Trainer.bare(config, world, policy, optimizer)
    metrics = update(t, split(t, batch, 0.0), {"step": 1, "updates": 0, "bad_in_a_row": 0})
    record = metrics.result()
    numbers = {key: torch.tensor(value) for key, value in record.items() if math.isfinite(value)}
    return (
        {f"metric {name}": value for name, value in numbers.items()}
        | {f"grad {name}": grad for name, grad in zip(trained, optimizer.seen, strict=True)}
        | {f"weight {name}": full(p.detach()).clone() for name, p in policy.named_parameters()}
    )


def oracle(name: str) -> dict[str, torch.Tensor]:
    """The same loss in float64, a sequence at a time, by transformers' own attention and full logits."""
    config = Config()
    configure(name, config)
    lm = make_lm(config).double()
    lm.set_attn_implementation("sdpa")
    make, normalizer, coefficient = BATCHES[name]
    objective = make_objective(Config().objective)
    rows = [(g.example.prompt_ids, row) for g in make() for row in objective.assign(g, 0.0)]
    count = sum(len(row.token_ids) for _, row in rows)
    loss = torch.zeros((), dtype=torch.float64)
    for prompt, row in rows:
        logits = lm(torch.tensor([[*prompt, *row.token_ids]])).logits[0, len(prompt) - 1 : -1]
        log_p = logits.log_softmax(-1)
        logp = log_p.gather(1, torch.tensor(row.token_ids)[:, None])[:, 0]
        p = logp.exp()
        gain = p / (p + GAMMA) if row.is_trace else (logp - logp.detach()).exp()
        entropy = -(log_p.exp() * log_p).sum(-1)
        policy = {"tokens": gain.sum() / count, "sequences": gain.mean() / len(rows)}
        loss = (
            loss - row.advantage * policy.get(normalizer, gain.sum() / NORMALIZER) - coefficient * entropy.sum() / count
        )
    loss.backward()
    return {"metric actor/loss": loss.detach()} | {
        f"grad lm.{n}": p.grad for n, p in lm.named_parameters() if p.requires_grad
    }


# of float32 sums; AVX2's narrower ones leave 1.03e-5 in one gradient of the adapters
SAME = 1e-5 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 2e-5


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float, what: str) -> None:
    """Each tensor within `tolerance` of its largest entry."""
    for name, value in want.items():
        off = (got[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-6)
        assert off <= tolerance, f"{what}: {name} is off by {off:.1e}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """One rank, one micro-batch: what all others are compared with, itself compared with the oracle."""
    folder = tmp_path_factory.mktemp("whole")
    for name in BATCHES:
        found = one_update(name, MeshConfig(), 10_000)
        if name == "clipped":
            assert found["metric actor/pg_clipfrac"] > 0
            assert found["metric actor/updates"] == 5
        else:  # of one update
            assert_same(found, oracle(name), 1e-4, f"{name}, one rank")
        save_file(found, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("budget", [60, 30, 1])
def test_micro_batches_of_one_rank(whole, budget):
    for name in BATCHES:
        assert_same(one_update(name, MeshConfig(), budget), load_file(whole / f"{name}.safetensors"), SAME, name)


@pytest.mark.parametrize(
    ("world", "meshes"),
    [
        (2, [MeshConfig(), MeshConfig(replicate=2), MeshConfig(sequence=2)]),
        pytest.param(
            4,
            [MeshConfig(), MeshConfig(replicate=2), MeshConfig(sequence=2), MeshConfig(sequence=4)],
            marks=pytest.mark.slow,
        ),
        pytest.param(4, [MeshConfig(replicate=2, sequence=2)], marks=pytest.mark.slow),
    ],
    ids=["2", "4", "4-hybrid"],
)
def test_ranks_change_nothing_but_rounding(whole, world, meshes):
    ranks.run(world, _compare, meshes, str(whole))


def _compare(rank: int, world: int, meshes: list[MeshConfig], whole: str) -> None:
    for mesh in meshes:
        for name in BATCHES:
            want = load_file(Path(whole) / f"{name}.safetensors")
            for budget in (10_000, 30):
                got = one_update(name, mesh, budget)
                assert_same(got, want, SAME, f"{world} ranks, {mesh}, {name}, budget {budget}")


def test_heads_that_cannot_be_shared_are_named():
    with pytest.raises(distributed.UserError, match="3 ranks cannot share the model's 4 attention heads; take one of"):
        sequence.check_heads(tiny_lm().config, 3)


def test_ranks_that_do_not_divide_into_the_mesh_are_named():
    with pytest.raises(distributed.UserError, match=r"1 ranks cannot be split into mesh.replicate 2 x mesh.sequence 3"):
        distributed.start(MeshConfig(replicate=2, sequence=3))
