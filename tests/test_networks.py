"""Networks beside the policy: what they say and learn, that a checkpoint holds them, and runs that have them."""

import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_train import arguments, assert_same_state, records, state, without_times
from tiny import luffy, make_model, make_policy, make_tokenizer
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForCausalLM

from luffy import distributed, plan
from luffy.balance import Unit
from luffy.checkpoint import Checkpointer, load_networks
from luffy.checkpoint.state import network_tensors
from luffy.config import MeshConfig, config_of
from luffy.errors import UserError
from luffy.groups import Group, Row
from luffy.load import load_weights
from luffy.machines import find_machine
from luffy.networks import make_networks
from luffy.networks.judge import judge
from luffy.optim import make_optimizer
from luffy.packing import assemble
from luffy.sequence import holds, slice_of
from luffy.shapes import find_shape
from luffy.shards import fill, full
from luffy.share import share_of
from luffy.train import micro_batches, split

ANY = {"accuracy_low": 0.0, "accuracy_high": 1.0}
GRADER = "def grade(response, answer):\n    return float(sum(response.encode()) % 3 == 0)\n"


def configured(name: str, **options):
    config = config_of(name)()
    config.objective = type(config.objective)(**options)
    config.model.dtype, config.train.tokens_per_micro, config.rollout.temperature = "float32", 24, 0.7
    return config


def trainer(path: Path, config) -> SimpleNamespace:
    """What `judge` and `learn` need of one."""
    from luffy.objectives import make_objective

    world = distributed.start(MeshConfig())
    config.train.updates_per_step = 1
    return SimpleNamespace(
        config=config,
        world=world,
        device=world.device,
        policy=make_policy(str(path)),
        objective=make_objective(config.objective),
        networks=make_networks(config, str(path), world),
    )


def some_groups() -> list[Group]:
    rng = random.Random(3)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 250) for _ in range(n))

    lengths = ((3, (1, 7, 4)), (9, (12, 2)), (2, (5, 5)))
    return [
        Group(
            example=SimpleNamespace(prompt_ids=ids(prompt)),
            rows=[Row(token_ids=ids(n), text="", reward=float(at == 0)) for at, n in enumerate(rows)],
        )
        for prompt, rows in lengths
    ]


def log_probs(lm, group: Group, row: Row, temperature: float) -> torch.Tensor:
    """[n] of a row's tokens, by transformers alone."""
    ids = torch.tensor([[*group.example.prompt_ids, *row.token_ids]])
    logits = lm(ids).logits[0, len(group.example.prompt_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(row.token_ids)[:, None])[:, 0]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "luffy"])
def test_nothing_is_loaded_that_no_coefficient_asks_for(name, monkeypatch):
    monkeypatch.setattr("luffy.networks.base.empty_lm", None)  # whoever loads calls it
    assert make_networks(configured(name), "nowhere", None) == []
    assert configured(name, kl_coef=1e-4).objective.networks == ("reference",)


def test_the_reference_says_what_the_model_says_and_keeps_no_gradient(tmp_path):
    path = make_model(tmp_path / "model")
    t, groups = trainer(path, configured("grpo", kl_coef=0.1)), some_groups()
    judge(t, groups, 0)
    [reference] = t.networks
    assert reference.optimizer is None
    assert not any(p.requires_grad for p in reference.model.parameters())
    lm = AutoModelForCausalLM.from_pretrained(path).double()
    for group in groups:
        for row in group.rows:
            want = log_probs(lm, group, row, 0.7)
            assert torch.allclose(row.said["reference"].double(), want, atol=1e-4), row


def test_the_frozen_reference_is_held_in_the_compute_type(tmp_path):
    config = configured("grpo", kl_coef=0.1)
    config.model.dtype = "bfloat16"
    [reference] = trainer(make_model(tmp_path / "model"), config).networks
    assert {p.dtype for p in reference.model.parameters()} == {torch.bfloat16}
    assert all(b.dtype != torch.bfloat16 for b in reference.model.buffers())  # rotary frequencies


def test_the_value_model_learns_the_returns(tmp_path):
    """Values, loss and the gradients of head and body in float64, one sequence after the other."""
    path = make_model(tmp_path / "model")
    t, groups = trainer(path, configured("ppo")), some_groups()
    [value] = t.networks
    judge(t, groups, 0)
    assert all(not row.said["value"].any() for group in groups for row in group.rows)  # a head of zeros
    head = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)) / 8
    fill(value.model.head.weight.detach(), head)
    judge(t, groups, 0)
    parts = split(t, groups, 0.0)
    seen = {}
    value.step = lambda name, loss, update, total: seen.update(
        {name: torch.tensor(loss)} | {n: full(p.grad) for n, p in value.model.named_parameters()}
    )
    value.learn(micro_batches(t, parts[0]), 0, 1)

    lm = AutoModelForCausalLM.from_pretrained(path).double()
    w = head.double().requires_grad_()
    losses = []
    for group, row in [(g, row) for g in groups for row in g.rows]:
        ids = torch.tensor([[*group.example.prompt_ids, *row.token_ids]])
        hidden = lm.model(ids).last_hidden_state[0, len(group.example.prompt_ids) - 1 : -1]
        values = (hidden @ w.T)[:, 0]
        assert torch.allclose(row.said["value"].double(), values, atol=1e-5)
        losses.append((values - row.reward).square() / 2)
    loss = torch.cat(losses).mean()
    loss.backward()
    assert seen["critic/vf_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(seen["head.weight"].double(), w.grad, atol=1e-6)
    body = dict(lm.model.named_parameters())
    for name, grad in ((n.removeprefix("lm.model."), g) for n, g in seen.items() if n.startswith("lm.model.")):
        assert torch.allclose(grad.double(), body[name].grad, atol=1e-5), name
    assert sum(n.startswith("lm.") for n in seen) == len(body)  # nothing of the vocabulary's head


def test_the_implicit_reward_model_learns_outcomes_by_cross_entropy(tmp_path):
    """Loss and gradients in float64 by autograd through the sum of an answer, which the model itself never does."""
    path = make_model(tmp_path / "model")
    config = configured("prime", beta=0.3, reward_update="after", **ANY)
    t, groups = trainer(path, config), some_groups()
    _, phi = t.networks
    assert judge(t, groups, 0) == {}
    for row in (row for group in groups for row in group.rows):
        assert torch.equal(row.said["implicit_reward"], row.said["reference"])  # so that no token has a reward yet
    other = make_model(tmp_path / "other", seed=1)
    load_weights(phi.model, str(other), t.device)
    micros = micro_batches(t, split(t, groups, 0.0)[0])
    seen = {}
    phi.step = lambda name, loss, update, total: seen.update(
        {name: torch.tensor(loss)} | {n: full(p.grad) for n, p in phi.model.named_parameters()}
    )
    phi.learn(micros, 0, 1)

    reference = AutoModelForCausalLM.from_pretrained(path).double()
    lm = AutoModelForCausalLM.from_pretrained(other).double()
    losses = []
    for group, row in [(g, row) for g in groups for row in g.rows]:
        added = log_probs(lm, group, row, 0.7) - log_probs(reference, group, row, 0.7).detach()
        outcome = torch.tensor(row.reward, dtype=torch.float64)
        losses.append(binary_cross_entropy_with_logits(0.3 * added.sum(), outcome))
    loss = torch.stack(losses).mean()
    loss.backward()
    assert seen["reward_model/ce_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in lm.named_parameters():
        scale = parameter.grad.abs().max()
        assert (seen[f"lm.{name}"].double() - parameter.grad).abs().max() <= 1e-4 * scale + 1e-9, name


def test_the_implicit_reward_model_learns_a_step_before_it_judges_it(tmp_path):
    """In as many updates as the policy makes, of the rows within the band alone."""
    path, config = make_model(tmp_path / "model"), configured("prime", reward_lr=0.01, accuracy_high=0.6)
    t, groups = trainer(path, config), some_groups()
    for row in groups[1].rows:
        row.reward = 0.0  # out of the band
    config.train.updates_per_step = 3
    _, phi = t.networks
    lessons, learn = [], phi.learn
    phi.learn = lambda micros, *at: lessons.append((sum(m.num_targets for m in micros), *at)) or learn(micros, *at)
    metrics = judge(t, groups, 12)
    total = 3 * config.train.steps
    assert lessons == [(12, 12, total), (10, 13, total)]  # as many as the policy's, which has no row of the second part
    assert metrics["reward_model/ce_loss"] != pytest.approx(math.log(2))  # the last one's
    said = [(row.said["implicit_reward"] - row.said["reference"]).sum().item() for row in groups[0].rows]
    assert said[0] > 0 > max(said[1:])  # the right one, and the wrong ones
    micros = share_of(t, groups, t.objective.judged)
    assert [x for micro in micros for x in micro.rewards.tolist()] == [1.0, 0.0, 0.0, 1.0, 0.0]


def test_value_updates_are_parts_of_the_rows(tmp_path):
    t, groups = trainer(make_model(tmp_path / "model"), configured("ppo", value_updates=3)), some_groups()
    judge(t, groups, 0)
    micros = micro_batches(t, split(t, groups, 0.0)[0])
    [value] = t.networks
    seen, update = [], value._update
    value._update = lambda part, *args: seen.extend(map(id, part)) or update(part, *args)
    found = value.learn(micros, 0, 1)
    assert len(micros) > 1
    assert seen == [id(micro) for micro in micros], "every row, once"
    assert {s["step"].item() for s in value.optimizer.state.values()} == {float(min(3, len(micros)))}
    assert found["critic/lr"] == 5e-6


@pytest.mark.parametrize(("objective", "options"), [("ppo", {}), ("prime", ANY)])
def test_gradients_of_what_is_taught_are_clipped(tmp_path, objective, options):
    """At a norm so small, that the weights move as little as the clip says."""
    t, groups = trainer(make_model(tmp_path / "model"), configured(objective, **options)), some_groups()
    judge(t, groups, 0)
    taught = t.networks[-1]
    assert taught.optim.max_grad_norm == taught.max_grad_norm == (10.0 if objective == "prime" else 1.0)
    taught.optim.max_grad_norm = 1e-3
    clipped, step = {}, taught.optimizer.step
    taught.optimizer.step = lambda *a: (
        clipped.update(
            norm=math.sqrt(
                sum(full(p.grad).square().sum().item() for p in taught.model.parameters() if p.grad is not None)
            )
        )
        or step(*a)
    )
    found = taught.learn(micro_batches(t, split(t, groups, 0.0)[0]), 0, 1)
    where = "critic" if objective == "ppo" else "reward_model"
    assert clipped["norm"] == pytest.approx(1e-3, rel=1e-3)
    assert found[f"{where}/grad_norm"] > 1e-3


@pytest.mark.parametrize(("objective", "options"), [("ppo", {}), ("prime", ANY)])
def test_a_checkpoint_holds_what_is_taught_bit_for_bit(tmp_path, objective, options):
    """Saved after one lesson and loaded elsewhere, the next lesson comes to the same weights."""
    path, groups = make_model(tmp_path / "model"), some_groups()
    config = configured(objective, **options)
    config.optim.lr = 0.01
    one = trainer(path, config)
    judge(one, groups, 0)
    micros = micro_batches(one, split(one, groups, 0.0)[0])
    teach(one, micros)
    keeper = Checkpointer(tmp_path / "checkpoints", 1)
    optimizer = make_optimizer(one.policy, config.optim)
    keeper.save(1, one.policy, optimizer, {}, make_tokenizer(), networks=one.networks)
    teach(one, micros)  # the copy is of the moment before
    keeper.close()
    other = trainer(path, config)
    load_networks(tmp_path / "checkpoints" / "step-000001", other.networks)
    teach(other, micros)
    saved, again = network_tensors(one.networks), network_tensors(other.networks)
    assert any(name.endswith(".exp_avg_sq") for name in saved)
    assert saved.keys() == again.keys()
    for name, tensor in saved.items():
        assert torch.equal(full(tensor), full(again[name])), name


def test_a_checkpoint_without_the_network_is_refused(tmp_path):
    path = make_model(tmp_path / "model")
    t = trainer(path, configured("ppo"))
    keeper = Checkpointer(tmp_path / "checkpoints", 1)
    keeper.save(1, t.policy, make_optimizer(t.policy, t.config.optim), {}, make_tokenizer())
    keeper.close()
    with pytest.raises(UserError, match=r"it has no value\..*resume with the run's own objective"):
        load_networks(tmp_path / "checkpoints" / "step-000001", t.networks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_a_micro_batch_put_together_what_each_holds(ranks):
    groups = some_groups()
    micro = assemble([Unit(g.example.prompt_ids, g.rows) for g in groups])
    numbers = torch.arange(micro.num_targets, dtype=torch.float32)
    micro.ref_logp = numbers
    found = torch.full_like(numbers, -1.0)
    for rank in range(ranks):
        part = slice_of(micro, rank, SimpleNamespace(size=lambda: ranks))
        found[holds(micro, rank, ranks)] = part.ref_logp
        assert part.ref_logp.numel() == part.num_targets
        assert part.rewards.tolist() == [row.reward for group in groups for row in group.rows]
    assert torch.equal(found, numbers)


def test_a_plan_counts_them():
    shape, machine = find_shape("qwen2.5-math-7b"), find_machine("h100")

    def held(name: str, **options) -> float:
        config = configured(name, **options)
        config.model.dtype = "bfloat16"
        asked = plan.ask(config, shape, machine, 8, 4096, None)
        parts = plan.evaluate(asked, plan.configured(asked)).parts
        return parts["weights"] + parts["optimizer"]

    alone = held("grpo")
    assert held("grpo", kl_coef=0.1) - alone == pytest.approx(2 * shape.parameters / 8)
    assert held("ppo") - alone == pytest.approx(12 * shape.parameters / 8)
    assert held("prime") - alone == pytest.approx(14 * shape.parameters / 8)


def teach(t, micros) -> None:
    for network in t.networks:
        network.learn(micros, 0, 1)


OPTIONS = {"reward__grader": "lucky:grade", "train__steps": 4, "eval__every": 0, "eval__limit": 1}
RUNS = {
    "kl": {"objective__name": "grpo", "objective__kl_coef": 0.1, "train__updates_per_step": 1},
    "prime": {
        "objective__name": "prime",
        "objective__accuracy_low": 0.1,
        "objective__reward_lr": 0.01,
        "objective__entropy_coef": 0.001,
    },
    "ppo": {"objective__name": "ppo", "objective__value_updates": 2},
}
RUNS["prime-after"] = RUNS["prime"] | {"objective__reward_update": "after"}
RUNS["prime-sequence"] = RUNS["prime"] | {"train__updates_per_step": 2}
SHARED = {"prime-sequence": ("--mesh.sequence=2",)}
"""Options of two ranks that share rows, not groups."""


@pytest.fixture(scope="module")
def home(home) -> Path:
    (home / "lucky.py").write_text(GRADER)
    return home


def run(home: Path, folder: str, name: str, *more: str, ranks: int = 1) -> Path:
    launch = ["--nproc-per-node", str(ranks)] if ranks > 1 else []
    options = OPTIONS | {"objective__entropy_coef": None} | RUNS[name]
    done = luffy(*arguments(home / folder, home / "model", *more, *launch, **options), cwd=home, PYTHONPATH=str(home))
    assert done.returncode == 0, done.stderr[-3000:]
    return home / folder


@pytest.mark.slow
def test_a_run_with_networks_learns(home):
    """PRIME's, which has both a frozen one and one that is taught."""
    steps = records(run(home, "once", "prime"))
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert steps[0]["reward_model/ce_loss"] == pytest.approx(math.log(2))  # no reward yet: sigmoid(0)
    taught = [record for record in steps[1:] if record["batch/zero_rows"] < record["batch/rows"]]
    assert len(taught) >= 2
    assert all(record["reward_model/ce_loss"] != pytest.approx(math.log(2)) for record in taught)
    assert steps[-1]["actor/kl_loss"] > 1e-3
    rates = [record["reward_model/lr"] for record in steps if "reward_model/lr" in record]
    assert len(set(rates)) == len(rates)  # its schedule is the policy's
    stored = state(home / "once", "step-000004")
    lessons = [value.item() for name, value in stored.items() if "implicit_reward" in name and name.endswith(".step")]
    updates = sum(record["actor/updates"] or 0 for record in steps)
    assert set(lessons) == {float(updates)}, "one for each of the policy's, before or after it"
    assert any("networks" in name and "implicit_reward" in name and name.endswith("exp_avg_sq") for name in stored)
    assert not any("reference" in name for name in stored)


@pytest.mark.slow  # two runs each
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_resumed_is_the_same_run(home, name, ranks):
    whole = run(home, f"{name}-{ranks}", name, ranks=ranks)
    again = home / f"{name}-{ranks}-again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step-000004")
    (again / "result.json").unlink()
    run(home, again.name, name, "--resume", ranks=ranks)
    one, other = records(whole), records(again)
    assert [record["step"] for record in one] == [1, 2, 3, 4]
    assert without_times(one) == without_times(other)
    assert_same_state(whole, again, "step-000004")
    if name == "ppo":
        assert all(record["critic/vf_loss"] > 0 for record in one)
    if name == "kl":
        assert one[0]["actor/kl_loss"] < 1e-5 < one[-1]["actor/kl_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_learn_what_one_does(home, name):
    """Losses and norms of the first step, of which sampling is the same."""
    one = records(run(home, f"{name}-of-1", name))[0]
    two = records(run(home, f"{name}-of-2", name, *SHARED.get(name, ()), ranks=2))[0]
    learned = [key for key in one if key.startswith(("critic/", "reward_model/", "actor/kl", "actor/grad"))]
    assert len(learned) >= 2
    for key in learned:
        assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-7), key
