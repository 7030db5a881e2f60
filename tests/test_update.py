"""The optimizer update: invariant to packing, clipped, guarded, scheduled."""

import math

import pytest
import torch
from test_objectives import example
from test_packing import tiny_lm

from luffy import distributed, optim
from luffy.config import Config, MeshConfig, OptimConfig, config_of
from luffy.groups import Group, Row
from luffy.model import Policy, head_options
from luffy.objectives import KNOWN
from luffy.setup import Trainer
from luffy.train import out_of_time, share_done, split, update


def groups() -> list[Group]:
    """Two groups of unequal rows, a trace in each, rewards mixed."""
    made = []
    for rewards in ([1.0, 0.0, 1.0], [0.0, 0.0, 1.0]):
        rows = [Row(token_ids=tuple(range(9, 12 + 3 * i)) + (2,), text="", reward=r) for i, r in enumerate(rewards)]
        for row in rows:
            row.sampler_logp = (-1.0,) * len(row.token_ids)
        rows[-1].is_trace, rows[-1].sampler_logp = True, ()
        made.append(Group(example=example(), rows=rows))
    return made


def trainer(objective: str = "luffy", **changes) -> Trainer:
    config: Config = config_of(objective)()
    if objective == "luffy":
        config.objective.normalizer, config.objective.entropy_coef = 10.0, 0.05
    config.optim.max_grad_norm = 1e9
    for key, value in changes.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    policy = Policy(tiny_lm(), config.rollout.temperature)
    sgd = torch.optim.SGD(policy.parameters(), lr=1.0)
    return Trainer.bare(config, distributed.start(MeshConfig()), policy, sgd)


def moved(**changes) -> torch.Tensor:
    """How one step changes the weights under plain gradient descent, flat."""
    t = trainer(optim__lr=1.0, **changes)
    before = torch.cat([p.detach().flatten().clone() for p in t.policy.parameters()])
    batch = groups()
    update(t, split(t, batch, 0.0), {"step": 1, "updates": 0, "bad_in_a_row": 0})
    return torch.cat([p.detach().flatten() for p in t.policy.parameters()]) - before


def test_micro_batches_change_nothing_but_rounding():
    whole = moved(train__tokens_per_micro=1000)
    assert whole.norm() > 1e-2
    for budget in (20, 1):  # unequal micro-batches: dividing by a local count would show
        torch.testing.assert_close(moved(train__tokens_per_micro=budget), whole, atol=1e-5, rtol=1e-3)


def test_the_entropy_bonus_the_temperature_and_the_normalizer_reach_the_update():
    whole = moved()
    assert (moved(objective__entropy_coef=0.0) - whole).norm() > 1e-3
    assert (moved(rollout__temperature=0.5) - whole).norm() > 1e-2
    torch.testing.assert_close(2 * moved(objective__normalizer=20.0, objective__entropy_coef=0.0),
                               moved(objective__entropy_coef=0.0), atol=1e-5, rtol=1e-3)  # fmt: skip


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("objective", KNOWN)
def test_every_objective_moves_the_policy(objective, updates):
    """Through the trainer's own update, and with a policy that has moved since the step began."""
    t = trainer(objective, optim__lr=0.1, train__updates_per_step=updates)
    before = torch.cat([p.detach().flatten().clone() for p in t.policy.parameters()])
    made = groups()
    for row in (row for group in made for row in group.rows):  # as networks would have it, where it wants some
        row.said = {name: torch.randn(len(row.token_ids)) for name in t.config.objective.networks}
    metrics = update(t, split(t, made, 0.3), {"step": 1, "updates": 0, "bad_in_a_row": 0})
    metrics.reduce(t.world)
    assert metrics.num_updates == updates
    assert metrics.bad_updates == 0
    assert math.isfinite(metrics.result()["actor/loss"])
    assert (torch.cat([p.detach().flatten() for p in t.policy.parameters()]) - before).norm() > 1e-7


def test_the_gradient_is_clipped():
    assert moved(optim__max_grad_norm=0.01).norm() == pytest.approx(0.01, rel=1e-3)


def test_a_bad_gradient_changes_nothing_and_good_ones_reset_the_count():
    t = trainer()
    batch = groups()
    loop = {"step": 1, "updates": 0, "bad_in_a_row": 0}
    weight = t.policy.lm.model.norm.weight
    with torch.no_grad():
        weight[0] = math.nan
    before = [p.detach().clone() for p in t.policy.parameters()]
    assert update(t, split(t, batch, 0.0), loop).bad_updates == 1
    assert loop["bad_in_a_row"] == 1
    for a, b in zip(before, t.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), equal_nan=True, atol=0, rtol=0)
    with torch.no_grad():
        weight[0] = 1.0
    assert update(t, split(t, batch, 0.0), loop).bad_updates == 0
    assert loop["bad_in_a_row"] == 0


def test_learning_rate_schedules():
    config = OptimConfig(lr=1.0, warmup_steps=4)
    assert [optim.learning_rate(config, i, 12) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    for schedule, middle in (("linear", 0.5), ("cosine", 0.5)):
        config = OptimConfig(lr=1.0, warmup_steps=2, schedule=schedule)
        assert optim.learning_rate(config, 2, 12) == pytest.approx(1.0)
        assert optim.learning_rate(config, 7, 12) == pytest.approx(middle)
        assert optim.learning_rate(config, 12, 12) == pytest.approx(0.0)


def test_a_time_limit_ends_training():
    config = Config()
    assert not out_of_time(config, {"train_seconds": 1e9})
    config.train.max_minutes = 2.0
    assert not out_of_time(config, {"train_seconds": 119.0})
    assert out_of_time(config, {"train_seconds": 120.0})
    assert share_done(config, {"train_seconds": 60.0, "step": 5}) == pytest.approx(0.5)


def test_logit_options_are_read_from_the_models_config():
    class Gemma:
        final_logit_softcapping = 30.0

    class Granite:
        logits_scaling = 8.0

    class Cohere:
        logit_scale = 0.0625

    assert head_options(Gemma()) == {"softcap": 30.0, "logit_scale": 1.0}
    assert head_options(Granite()) == {"softcap": None, "logit_scale": 0.125}
    assert head_options(Cohere()) == {"softcap": None, "logit_scale": 0.0625}
