"""Trainer against sampler: weights, gradients and statistics, however rows are packed and split."""

import math

import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file
from test_normalisation import Recording, assert_same, uneven
from test_packing import group, tiny_lm

from luffy import distributed
from luffy.config import Config, CorrectionConfig, MeshConfig
from luffy.config_file import load_config
from luffy.correction import correct, log_ratios, row_means, token_weights
from luffy.errors import UserError
from luffy.groups import Group
from luffy.metrics import UpdateMetrics
from luffy.model import Policy, shard
from luffy.objectives import make_objective
from luffy.packing import pack
from luffy.setup import Trainer
from luffy.shards import full
from luffy.train import split, update

NORMALIZER, ENTROPY, GAMMA = 10.0, 0.05, 0.1
KINDS = ("none", "truncate", "mask", "sequence_mask")
# of sequence_mask wide ones, for a tiny random model and gaps that a test can see
BOUNDS = {"none": (None, None), "truncate": (None, 2.0), "mask": (0.5, 5.0), "sequence_mask": (0.7, 1.5)}
LOG_RATIOS = (-1.2, -0.3, 0.0, 0.2, 1.0, 2.5)  # far from every bound


def full_logits(lm, prompt, answer) -> torch.Tensor:
    """[answer, V] float64, of one sequence, by transformers' own attention: `lm` is float64 and set to it."""
    return lm(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]


def exact_lm():
    lm = tiny_lm().train().double()
    lm.set_attn_implementation("sdpa")
    return lm


def log_probs(logits: torch.Tensor, answer) -> torch.Tensor:
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def sampled(temperature: float = 1.0) -> list[Group]:
    """`uneven`, drawn by a sampler that is off by LOG_RATIOS in turn; by e^3 in one stale row; in the longest row by e
    in one half and 1/e in the other, so that neither half alone tells what its mean is."""
    batch, lm, generator = uneven(), exact_lm(), torch.Generator().manual_seed(2)
    for n, item in enumerate(batch):
        for m, row in enumerate(item.rows):
            if row.is_trace:
                continue
            count = len(row.token_ids)
            off = torch.tensor(LOG_RATIOS)[torch.randint(len(LOG_RATIOS), (count,), generator=generator)]
            if (n, m) == (0, 1):
                off = torch.full((count,), 3.0)
            if count == 41:
                off = torch.where(torch.arange(count) < count // 2, 1.0, -1.0)
            with torch.no_grad():
                logp = log_probs(full_logits(lm, item.example.prompt_ids, row.token_ids) / temperature, row.token_ids)
            row.sampler_logp = tuple((logp - off).tolist())
    return batch


def by_hand(kind: str, ratios: list[float]) -> list[float]:
    """The definition of each weight, in plain numbers. ratios: of one row's tokens."""
    low, high = BOUNDS[kind]
    if kind == "truncate":
        return [min(ratio, high) for ratio in ratios]
    if kind == "mask":
        return [ratio if low <= ratio <= high else 0.0 for ratio in ratios]
    if kind == "sequence_mask":
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        assert min(abs(mean - low), abs(mean - high)) > 0.01, f"{mean} is a matter of rounding"
        return [float(low <= mean <= high)] * len(ratios)
    return [1.0] * len(ratios)


def configure(kind: str, budget: int = 10_000, updates: int = 1) -> Config:
    config = Config()
    config.objective.normalizer, config.objective.entropy_coef, config.objective.gamma = NORMALIZER, ENTROPY, GAMMA
    config.optim.max_grad_norm, config.optim.lr = 1e9, 1e-3
    config.train.tokens_per_micro, config.train.updates_per_step = budget, updates
    config.correction.kind = kind
    config.correction.low, config.correction.high = BOUNDS[kind]
    return config


def make_trainer(config: Config, mesh: MeshConfig | None = None) -> Trainer:
    world = distributed.start(mesh or MeshConfig())
    policy = Policy(tiny_lm().train(), config.rollout.temperature)
    if world.size > 1:
        policy = shard(policy, world.params, torch.float32)
    return Trainer.bare(config, world, policy, Recording(policy.parameters(), eps=1e-4))


def run_update(t: Trainer, batch: list[Group]) -> UpdateMetrics:
    return update(t, split(t, batch, 0.0), {"step": 1, "updates": 0, "bad_in_a_row": 0})


def one_update(kind: str, mesh: MeshConfig, budget: int, updates: int = 1) -> dict[str, torch.Tensor]:
    """Metrics, gradients (of the last update) and weights after it."""
    t = make_trainer(configure(kind, budget, updates), mesh)
    record = run_update(t, sampled()).result()
    names = [name for name, _ in t.policy.named_parameters()]
    return (
        {f"metric {name}": torch.tensor(value) for name, value in record.items() if math.isfinite(value)}
        | {f"grad {name}": grad for name, grad in zip(names, t.optimizer.seen, strict=True)}
        | {f"weight {name}": full(p.detach()).clone() for name, p in t.policy.named_parameters()}
    )


def oracle(kind: str) -> dict[str, torch.Tensor]:
    """The same update in float64, one sequence at a time, full logits, weights by hand."""
    lm, batch, objective = exact_lm(), sampled(), make_objective(Config().objective)
    rows = [(g.example.prompt_ids, row) for g in batch for row in objective.assign(g, 0.0)]
    count = sum(len(row.token_ids) for _, row in rows)
    loss, ratios, given = torch.zeros((), dtype=torch.float64), [], []
    for prompt, row in rows:
        logits = full_logits(lm, prompt, row.token_ids)
        logp, p = log_probs(logits, row.token_ids), logits.softmax(-1)
        if row.is_trace:
            gain = logp.exp() / (logp.exp() + GAMMA)
        else:
            mine = [math.exp(x - y) for x, y in zip(logp.tolist(), row.sampler_logp, strict=True)]
            weight = by_hand(kind, mine)
            gain = torch.tensor(weight) * (logp - logp.detach()).exp()
            ratios, given = ratios + mine, given + weight
        entropy = -(p * logits.log_softmax(-1)).sum(-1)
        loss = loss - row.advantage * gain.sum() / NORMALIZER - ENTROPY * entropy.sum() / count
    loss.backward()
    metrics = {
        "actor/loss": loss.item(),
        "rollout/ratio_mean": sum(ratios) / len(ratios),
        "rollout/ratio_max": max(ratios),
        "rollout/ratio_min": min(ratios),
        "rollout/kl_k3": sum(r - 1 - math.log(r) for r in ratios) / len(ratios),
        "rollout/weight_mean": sum(given) / len(given),
        "rollout/masked_fraction": given.count(0.0) / len(given),
    }
    return {f"metric {name}": torch.tensor(value) for name, value in metrics.items()} | {
        f"grad lm.{name}": p.grad for name, p in lm.named_parameters()
    }


# ---- weights


ROWS = torch.tensor([0, 0, 1, 1, 2, 3])
PI = torch.tensor([0.5, 0.2, 0.1, 0.6, 0.3, 0.4]).log()
MU = torch.tensor([0.2, 0.25, 0.4, 0.1, math.nan, 0.2]).log()  # ratios 2.5, 0.8, 0.25, 6, none, 2


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (CorrectionConfig(), [1, 1, 1, 1, 1, 1]),
        (CorrectionConfig(kind="truncate"), [2, 0.8, 0.25, 2, 1, 2]),
        (CorrectionConfig(kind="truncate", high=5.0), [2.5, 0.8, 0.25, 5, 1, 2]),
        (CorrectionConfig(kind="mask"), [2.5, 0.8, 0, 0, 1, 2]),
        (CorrectionConfig(kind="mask", low=0.1, high=2.2), [0, 0.8, 0.25, 0, 1, 2]),
        # geometric means sqrt 2, sqrt 1.5, none, 2
        (CorrectionConfig(kind="sequence_mask", low=1.3, high=1.9), [1, 1, 0, 0, 1, 0]),
        (CorrectionConfig(kind="sequence_mask", low=0.5, high=1.3), [0, 0, 1, 1, 1, 0]),
        (CorrectionConfig(kind="sequence_mask"), [0, 0, 0, 0, 1, 0]),
    ],
    ids=lambda value: f"{value.kind} {value.low} {value.high}" if isinstance(value, CorrectionConfig) else "",
)
def test_weights_by_hand(config, want):
    got = token_weights(log_ratios(PI, MU), config, ROWS, 4)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), atol=1e-6, rtol=1e-6)


def test_bounds_belong_to_the_weights():
    """Inclusive, as published."""
    config = CorrectionConfig(kind="mask", low=0.5, high=2.0)
    logp = torch.tensor([0.5, 2.0, 0.499, 2.001], dtype=torch.float64).log()
    assert token_weights(log_ratios(logp, torch.zeros(4)), config).tolist() == pytest.approx([0.5, 2, 0, 0])


def test_a_rows_mean_is_over_the_tokens_that_were_sampled():
    log_ratio = torch.tensor([0.3, math.nan, 0.5, math.nan], dtype=torch.float64)
    mean = row_means(log_ratio, torch.tensor([0, 0, 0, 1]), 2)
    assert mean[0].item() == pytest.approx(0.4)
    assert mean[1].isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_absurd_gaps_stay_finite(kind):
    logp, sampler = torch.tensor([-0.1, -1e4, -2.0]), torch.tensor([-1e4, -0.1, -math.inf])
    log_ratio = log_ratios(logp, sampler)
    assert log_ratio.tolist() == [20, -20, 20]
    weight = token_weights(log_ratio, CorrectionConfig(kind=kind), torch.tensor([0, 1, 2]), 3)
    want = {"none": [1, 1, 1], "truncate": [2, math.exp(-20), 2]}.get(kind, [0, 0, 0])
    assert weight.tolist() == pytest.approx(want)
    metrics = UpdateMetrics(make_objective(Config().objective).losses, GAMMA)
    metrics.add_ratios(log_ratio, weight)
    assert all(math.isfinite(metrics.result()[f"rollout/{name}"]) for name in ("ratio_mean", "ratio_max", "kl_k3"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_is_nan_is_not_masked_away(kind):
    log_ratio = log_ratios(torch.tensor([math.nan, -1.0]), torch.tensor([-1.0, -1.0]))
    assert token_weights(log_ratio, CorrectionConfig(kind=kind), torch.tensor([0, 0]), 1).tolist() == [1, 1]


def test_rows_are_numbered_by_pack():
    item = group([5, 6, 7], [10, 11, 12, 2], [13, 2], [2])
    [micro] = pack([item], lambda g: g.rows, 1000)
    assert micro.row.tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert micro.num_rows == 3
    [_, idle] = [pack([item], lambda g: g.rows, 1000, rank=rank, ranks=4)[0] for rank in (0, 3)]
    assert (idle.row.tolist(), idle.num_rows) == ([], 0)
    idle.old_logp = torch.zeros(0)
    assert correct(idle, CorrectionConfig(kind="sequence_mask"))[1].shape == (0,)


# ---- the ratio is right


def test_both_sides_apply_the_temperature():
    """The engine's log-probs are those of logits / T (`processed_logprobs`), and so are the policy's."""
    temperature, lm = 0.7, exact_lm()
    batch = sampled(temperature)
    policy = Policy(tiny_lm(), temperature)
    seen = 0
    for item in batch:
        for row in item.rows:
            [micro] = pack([item], lambda g, row=row: [row], 1000)
            with torch.no_grad():
                got = policy(micro).double()
                logits = full_logits(lm, item.example.prompt_ids, row.token_ids)
            want = log_probs(logits / temperature, row.token_ids)
            torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
            seen += (log_probs(logits, row.token_ids) - want).abs().max() > 1e-2
            row.sampler_logp = () if row.is_trace else tuple(want.tolist())
    assert seen > 5  # a temperature forgotten on one side would show
    config = configure("mask")
    config.rollout.temperature = temperature
    record = run_update(make_trainer(config), batch).result()
    assert record["rollout/ratio_min"] == pytest.approx(1, abs=1e-4)
    assert record["rollout/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert record["rollout/masked_fraction"] == 0


class Watched:
    """The micro-batches that a policy is shown, and how often each."""

    def __init__(self, policy: Policy) -> None:
        self.passes: list = []
        policy.register_forward_pre_hook(lambda _, args: self.passes.append(args[0]))

    @property
    def micros(self) -> list:
        return list({id(micro): micro for micro in self.passes}.values())


@pytest.mark.parametrize(("kind", "updates"), [*((kind, 1) for kind in KINDS), ("mask", 5), ("none", 5)])
def test_what_the_kernel_is_given(kind, updates):
    """token_weight by hand, rows weighted by the objective; traces 1; one pass more with a correction, none without."""
    config = configure(kind, budget=30, updates=updates)
    config.objective.normalizer = "sequences"  # Row.weight = 1 / length
    t, batch, lm = make_trainer(config), sampled(), exact_lm()
    want, traces = {}, 0
    for item in batch:
        for row in item.rows:
            given = [1.0] * len(row.token_ids)
            if not row.is_trace:
                with torch.no_grad():
                    logp = log_probs(full_logits(lm, item.example.prompt_ids, row.token_ids), row.token_ids)
                given = by_hand(kind, [math.exp(x - y) for x, y in zip(logp, row.sampler_logp, strict=True)])
            traces += row.is_trace
            want[row.token_ids] = [x / len(row.token_ids) for x in given]
    watched = Watched(t.policy)
    run_update(t, batch)
    got = {}
    for micro in watched.micros:
        for number in range(micro.num_rows):
            mine = micro.row == number
            got[tuple(micro.targets[mine].tolist())] = micro.token_weight[mine].tolist()
    assert got.keys() == want.keys()
    assert traces
    for key, value in want.items():
        assert got[key] == pytest.approx(value, abs=1e-5)
    again = 2 if kind != "none" or updates > 1 else 1
    assert len(watched.micros) > 1
    assert len(watched.passes) == again * len(watched.micros)
    assert all((micro.old_logp is None) == (again == 1) for micro in watched.micros)


def test_the_stale_row_counts_for_what_its_sampler_was():
    """Row (0, 1) was drawn where each token was e^3 less likely than it is now."""
    batch = sampled()[:1]
    stale = batch[0].rows[1]
    for kind, want in (("truncate", 2.0), ("mask", 0.0), ("sequence_mask", 0.0)):
        t = make_trainer(configure(kind))
        watched = Watched(t.policy)
        run_update(t, batch)
        [micro] = watched.micros
        [number] = [n for n in range(3) if tuple(micro.targets[micro.row == n].tolist()) == stale.token_ids]
        assert micro.token_weight[micro.row == number].tolist() == pytest.approx([want] * len(stale.token_ids))


# ---- the update


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One rank, one micro-batch: compared with the oracle here, with all others below."""
    folder = tmp_path_factory.mktemp("whole")
    for kind in KINDS:
        found = one_update(kind, MeshConfig(), 10_000)
        assert_same(found, oracle(kind), 1e-4, f"{kind}, one rank")
        save_file(found, folder / f"{kind}.safetensors")
        save_file(one_update(kind, MeshConfig(), 10_000, updates=5), folder / f"{kind}-5.safetensors")
    return folder


def test_each_kind_has_its_own_gradient(whole):
    name = "grad lm.model.layers.0.self_attn.q_proj.weight"
    grads = [load_file(whole / f"{kind}.safetensors")[name] for kind in KINDS]
    for n, one in enumerate(grads):
        for other in grads[:n]:
            assert (one - other).abs().max() > 0.05 * one.abs().max()


def test_the_packing_changes_nothing_but_rounding(whole):
    for kind in KINDS[1:]:
        want = load_file(whole / f"{kind}.safetensors")
        for budget in (60, 30, 1):
            assert_same(one_update(kind, MeshConfig(), budget), want, 1e-5, f"{kind}, budget {budget}")


def test_ranks_change_nothing_but_rounding(whole):
    ranks.run(2, _compare, str(whole))


def _compare(rank: int, world: int, whole: str) -> None:
    for mesh in (MeshConfig(), MeshConfig(sequence=2)):
        for kind in KINDS[1:]:  # test_normalisation has the first
            for budget, updates in ((10_000, 1), (30, 1), (30, 5)):
                want = load_file(f"{whole}/{kind}{'-5' if updates > 1 else ''}.safetensors")
                if updates > 1:  # a mean of differences of nearly equal log-probs, of both signs
                    del want["metric actor/ppo_kl"]
                got = one_update(kind, mesh, budget, updates)
                assert_same(got, want, 1e-5, f"{mesh}, {kind}, budget {budget}, {updates} updates")


# ---- statistics


def metrics_of_nothing() -> UpdateMetrics:
    return UpdateMetrics(make_objective(Config().objective).losses, GAMMA)


def test_statistics_by_hand():
    metrics = metrics_of_nothing()
    for part in (slice(0, 4), slice(4, 6)):  # unequal: a mean of means would differ
        metrics.add_ratios(log_ratios(PI[part], MU[part]), torch.tensor([2.5, 0.8, 0, 0, 1, 2])[part])
    got = metrics.result()
    ratios = [2.5, 0.8, 0.25, 6, 2]
    assert got["rollout/ratio_mean"] == pytest.approx(sum(ratios) / 5)
    assert got["rollout/ratio_max"] == pytest.approx(6)
    assert got["rollout/ratio_min"] == pytest.approx(0.25)
    assert got["rollout/kl_k3"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 5)
    assert got["rollout/weight_mean"] == pytest.approx(5.3 / 5)  # the trace's weight is not among them
    assert got["rollout/masked_fraction"] == pytest.approx(2 / 5)


def test_statistics_of_no_rollouts_are_nan_and_not_zero():
    metrics = metrics_of_nothing()
    metrics.add_ratios(log_ratios(PI[4:5], MU[4:5]), torch.ones(1))
    got = metrics.result()
    for name in ("ratio_mean", "ratio_max", "ratio_min", "kl_k3", "weight_mean", "masked_fraction"):
        assert math.isnan(got[f"rollout/{name}"]), name


# ---- configuration


def test_null_bounds_are_those_published_for_the_kind():
    assert CorrectionConfig(kind="truncate").bounds == (0.0, 2.0)
    assert CorrectionConfig(kind="mask").bounds == (0.5, 5.0)
    assert CorrectionConfig(kind="sequence_mask").bounds == (0.999, 1.001)
    assert CorrectionConfig(kind="mask", high=3.0).bounds == (0.5, 3.0)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["--correction.kind=mask", "--correction.low=6"],
            "correction.low must be below correction.high, got 6.0 and 5",
        ),
        (["--correction.low=2", "--correction.high=2"], "correction.low must be below correction.high, got 2.0 and 2"),
        (["--correction.kind=truncate", "--correction.low=0.5"], "correction.low means nothing"),
        (["--correction.kind=mask", "--correction.low=0"], "correction.low .*greater than 0"),
        (["--correction.kind=tis"], "correction.kind .*'tis'"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        load_config("quickstart", overrides)


def test_a_correction_can_be_asked_for():
    config = load_config("quickstart", ["--correction.kind=truncate", "--correction.high=3"])
    assert config.correction.bounds == (0.0, 3.0)
    assert load_config("quickstart").correction.kind == "none"
