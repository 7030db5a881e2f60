"""Every objective against its published formula: rows, advantages and per-token gradients of hand-made groups, written
here a second time in float64."""

import dataclasses
import math
import sys
from statistics import fmean, pstdev, stdev
from types import SimpleNamespace

import pytest
import ranks
import torch
import torch.distributed as dist
from luffy_kernels import token_loss

from luffy.advantages import group_advantages
from luffy.config_file import load_config
from luffy.data import Example
from luffy.data.problem import Problem
from luffy.errors import UserError
from luffy.groups import Group, Row
from luffy.objectives import KNOWN, find, make_objective, options_of
from luffy.objectives.choice import Known
from luffy.objectives.looking import Seen, highest
from luffy.packing import pack

GAMMA = 0.1


def make(name: str, **options):
    return make_objective(options_of(name)(**options))


def example(num_traces: int = 1) -> Example:
    problem = Problem(
        id="p", data_source="s", messages=({"role": "user", "content": "?"},), answer="1", traces=(), extra={}
    )
    return Example(problem, (1, 2, 3), tuple((4, 5, i) for i in range(num_traces)))


def group(rollout_rewards, trace_reward=None, first: int = 10) -> Group:
    """Rows of 2, 3, 4, ... tokens, each token there once."""
    rewards = [*rollout_rewards, *([] if trace_reward is None else [trace_reward])]
    rows, at = [], first
    for i, reward in enumerate(rewards):
        ids = tuple(range(at, at + 2 + i))
        at += len(ids)
        rows.append(Row(token_ids=ids, text="", reward=reward, is_trace=i == len(rollout_rewards)))
    return Group(example=example(trace_reward is not None), rows=rows)


class World:
    """Log-probs and entropies of tokens: of the policy now, at the step's beginning, and of who sampled them."""

    def __init__(self, groups: list[Group]) -> None:
        rng = torch.Generator().manual_seed(0)
        self.groups = groups
        self.now, self.old, self.mu, self.entropy = {}, {}, {}, {}
        for row in (row for g in groups for row in g.rows):
            for token in row.token_ids:
                draw = torch.rand(4, generator=rng, dtype=torch.float64)
                self.now[token] = float(-2 * draw[0] - 0.05)
                self.old[token] = self.now[token] + 0.6 * float(draw[1] - 0.5)
                self.mu[token] = math.nan if row.is_trace else self.now[token] + 0.5 * float(draw[2] - 0.5)
                self.entropy[token] = float(draw[3])
            row.sampler_logp = () if row.is_trace else tuple(self.mu[token] for token in row.token_ids)

    def of(self, values: dict[int, float], targets: torch.Tensor) -> torch.Tensor:
        return torch.tensor([values[int(token)] for token in targets], dtype=torch.float64)

    def gradients(self, objective, progress: float = 0.0) -> dict[int, float]:
        """d loss / d log-prob of each token, by the objective; tokens that do not enter the model have none."""
        terms = objective.terms(self.groups, progress)
        rows = {id(g): found for g, found in zip(terms.groups, terms.rows, strict=True)}
        found: dict[int, float] = {}
        for micro in pack(self.groups, lambda g: rows[id(g)], 1_000):
            logp = self.of(self.now, micro.targets).requires_grad_()
            micro.old_logp = self.of(self.old, micro.targets)
            micro.sampler_logp = micro.sampler_logp.double()
            objective.weigh(micro, Seen(logp.detach(), self.of(self.entropy, micro.targets)))
            given = {"losses": objective.losses, "loss_id": micro.loss_id, "old_logp": micro.old_logp}
            given["old_logp"] = micro.compared_logp.double()
            given |= {"advantages": micro.advantages.double(), "token_weight": micro.token_weight.double()}
            if terms.kl_coef:
                given |= {"kl_coef": terms.kl_coef, "ref_logp": micro.ref_logp.double()}
            loss = token_loss(logp, **given).loss.sum() / terms.normalizer
            [grad] = torch.autograd.grad(loss, logp)
            for token, value in zip(micro.targets.tolist(), grad.tolist(), strict=True):
                found[token] = found.get(token, 0.0) + value
        return found

    def expect(self, objective, formula, progress: float = 0.0) -> None:
        """formula(group, row, token) -> gradient; 0 may be one that stays out of the model."""
        got = self.gradients(objective, progress)
        want = {token: formula(g, row, token) for g in self.groups for row in g.rows for token in row.token_ids}
        assert any(want.values())
        for token, value in want.items():
            assert got.get(token, 0.0) == pytest.approx(value, rel=2e-5, abs=1e-9), token
        assert set(got) <= set(want)

    def row_sum(self, row: Row, before: dict[int, float]) -> float:
        return sum(self.now[token] - before[token] for token in row.token_ids)


def rollouts(g: Group) -> list[Row]:
    return [row for row in g.rows if not row.is_trace]


def tokens(rows) -> int:
    return sum(len(row.token_ids) for row in rows)


def plain() -> World:
    return World([group([1.0, 0.0, 0.0, 1.0]), group([0.0, 0.0, 1.0, 0.0], first=100), group([1.0] * 4, first=200)])


def guided() -> World:
    return World(
        [group([1.0, 0.0, 0.0], 1.0), group([0.0, 0.0, 0.0], 1.0, first=100), group([1.0, 0.0], 0.0, first=200)]
    )


def standard(g: Group, row: Row, rows=None) -> float:
    """GRPO's advantage."""
    rewards = [r.reward for r in (g.rows if rows is None else rows)]
    return (row.reward - fmean(rewards)) / (stdev(rewards) + 1e-6) if len(set(rewards)) > 1 else 0.0


def centred(g: Group, row: Row, rows=None) -> float:
    return row.reward - fmean(r.reward for r in (g.rows if rows is None else rows))


def clipped(a: float, r: float, low: float, high: float) -> float:
    """-A r, or 0 where PPO's clip has taken over."""
    return 0.0 if (a > 0 and r > 1 + high) or (a < 0 and r < 1 - low) else -a * r


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_clipped_policy_gradients(name):
    w = plain()
    count, rows = tokens(row for g in w.groups for row in g.rows), sum(len(g.rows) for g in w.groups)
    advantage = centred if name == "dr_grpo" else standard
    high = 0.28 if name == "dapo" else 0.2

    def formula(g, row, token):
        r = math.exp(w.now[token] - w.old[token])
        share = {"grpo": 1 / (len(row.token_ids) * rows), "dr_grpo": 1 / 65536, "dapo": 1 / count}[name]
        return clipped(advantage(g, row), r, 0.2, high) * share

    w.expect(make(name, rows=4, entropy_coef=0.0), formula)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_a_kl_term_holds_every_token_to_the_reference(name):
    """k3 = q/p - log q/p - 1 has the derivative 1 - q/p in log p; a mean over all tokens, whatever the loss is."""
    w = plain()
    reference = {token: logp + 0.4 * math.sin(token) for token, logp in w.now.items()}
    for row in (row for g in w.groups for row in g.rows):
        row.said["reference"] = w.of(reference, torch.tensor(row.token_ids)).float()
    count = tokens(row for g in w.groups for row in g.rows)
    without = w.gradients(make(name, rows=4, entropy_coef=0.0))
    assert len(without) < count  # a group whose rewards are all equal has no gradient of its own

    def formula(g, row, token):
        return without.get(token, 0.0) + 0.3 * (1 - math.exp(reference[token] - w.now[token])) / count

    w.expect(make(name, rows=4, entropy_coef=0.0, kl_coef=0.3), formula)


def judged(name: str, scale: float = 1.0) -> World:
    """With what a network says of each token, a float32 number."""
    w = plain()
    for row in (row for g in w.groups for row in g.rows):
        row.said[name] = torch.tensor([scale * math.sin(3 * token) for token in row.token_ids])
    return w


def gae(row: Row, discount: float, lam: float) -> list[float]:
    """The sum of eq. 16 of arXiv 1506.02438, written out."""
    v = [*row.said["value"].double().tolist(), 0.0]
    n = len(row.token_ids)
    delta = [(row.reward if t == n - 1 else 0.0) + discount * v[t + 1] - v[t] for t in range(n)]
    return [sum((discount * lam) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("discount", "lam"), [(1.0, 1.0), (1.0, 0.9), (0.97, 0.8)])
def test_ppo(discount, lam, normalise):
    w = judged("value")
    found = {id(row): gae(row, discount, lam) for g in w.groups for row in g.rows}
    if (discount, lam) == (1.0, 1.0):
        for row in w.groups[0].rows:
            assert found[id(row)] == pytest.approx([row.reward - v for v in row.said["value"].tolist()])
    every = [a for advantages in found.values() for a in advantages]
    mean, deviation = (fmean(every), pstdev(every)) if normalise else (0.0, 1.0)

    def formula(g, row, token):
        a = (found[id(row)][row.token_ids.index(token)] - mean) / deviation
        return clipped(a, math.exp(w.now[token] - w.old[token]), 0.2, 0.2) / len(every)

    w.expect(make("ppo", rows=4, discount=discount, gae_lambda=lam, normalise=normalise), formula)
    for row in (row for g in w.groups for row in g.rows):
        want = [a + v for a, v in zip(found[id(row)], row.said["value"].tolist(), strict=True)]
        assert row.returns.tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_prime(discount, published):
    w = judged("implicit_reward", scale=2.0)
    for row in (row for g in w.groups for row in g.rows):
        row.said["reference"] = torch.tensor([-1.0 - 0.01 * token for token in row.token_ids])
    options = {"beta": 0.3, "process_coef": 2.0, "outcome_coef": 3.0, "discount": discount}
    objective = make("prime", rows=4, process_norm=published, normalise=published, **options)

    def process(row: Row) -> list[float]:
        said = zip(row.said["implicit_reward"].double().tolist(), row.said["reference"].double().tolist(), strict=True)
        return [0.3 * (phi - reference) for phi, reference in said]

    kept = w.groups[:2]  # the third is all right, and out of the band
    sums = [abs(sum(process(row)[t:])) for g in kept for row in g.rows for t in range(len(row.token_ids))]
    scale = max(sums) + 1e-6 if published else 1.0
    found = {}
    for row, others in ((row, [r for r in g.rows if r is not row]) for g in kept for row in g.rows):
        baseline = fmean(fmean(process(other)) for other in others)
        outcome = row.reward - fmean(other.reward for other in others)
        centred = [(r - baseline) / scale for r in process(row)]
        for t, token in enumerate(row.token_ids):
            later = sum(discount ** (s - t) * centred[s] for s in range(t, len(centred)))
            found[token] = 2.0 * later + 3.0 * outcome
    mean, deviation = (fmean(found.values()), pstdev(found.values())) if published else (0.0, 1.0)

    def formula(g, row, token):
        a = (found.get(token, mean) - mean) / deviation
        return clipped(a, math.exp(w.now[token] - w.old[token]), 0.2, 0.2) / len(found)

    w.expect(objective, formula)
    assert set(w.gradients(objective)) == set(found)


@pytest.mark.parametrize(("right", "stays"), [(0, False), (1, False), (2, True), (8, True), (9, False), (10, False)])
def test_prime_keeps_groups_within_the_band(right, stays):
    objective, made = make("prime", rows=10), group([1.0] * right + [0.0] * (10 - right))
    for row in made.rows:
        row.said = {name: torch.zeros(len(row.token_ids)) for name in objective.options.networks}
    terms = objective.terms([made], 0.0)
    assert (terms.rows == [made.rows]) == stays
    assert objective.judged(made) == terms.rows[0]
    assert terms.normalizer == (tokens(made.rows) if stays else 1.0)


def test_primes_band_is_of_the_mean_reward():
    half = group([0.5] * 4)  # none of them is solved
    assert make("prime", rows=4).judged(half) == half.rows


def test_dapo_punishes_what_is_too_long():
    objective = make("dapo", rows=3, overlong_after=2, overlong_span=4)
    g = group([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0])  # of 2 to 8 tokens
    assert objective.rewards(g) == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, -1.0]
    assert make("dapo", rows=3).rewards(g) == [1.0] * 6 + [0.0]


def test_cispo():
    w = plain()
    count = tokens(row for g in w.groups for row in g.rows)

    def formula(g, row, token):
        return -standard(g, row) * min(math.exp(w.now[token] - w.old[token]), 1.1) / count

    w.expect(make("cispo", rows=4, clip_high=0.1), formula)


def test_gspo():
    w = plain()
    rows, bounds = sum(len(g.rows) for g in w.groups), (0.05, 0.06)
    seen = set()

    def formula(g, row, token):
        s, a = math.exp(w.row_sum(row, w.old) / len(row.token_ids)), standard(g, row)
        value = clipped(a, s, *bounds)
        seen.add(value == 0 if a else None)
        return value / len(row.token_ids) / rows

    w.expect(make("gspo", rows=4, clip_low=bounds[0], clip_high=bounds[1]), formula)
    assert seen == {True, False, None}
    for bounds in ((1.0, 0.01), (0.01, 1.0)):  # each by itself
        w.expect(make("gspo", rows=4, clip_low=bounds[0], clip_high=bounds[1]), formula)


RESHAPED = {  # of x: the surrogate's derivative in log x
    "ratio": lambda x: x,
    "square_root": lambda x: x**0.5 / 2,
    "pow": lambda x: 0.3 * x**0.3,
    "p_logp": lambda x: x + 0.2,
}


@pytest.mark.parametrize("on", [*RESHAPED, "logp", "shaped"])
@pytest.mark.parametrize("off", [*RESHAPED, "logp", "shaped"])
def test_luffy_and_the_reshapes_of_its_code(on, off):
    w = guided()

    def formula(g, row, token):
        p, q = math.exp(w.now[token]), math.exp(w.old[token])
        if row.is_trace:
            slope = GAMMA * p / (p + GAMMA) ** 2 if off == "shaped" else 0.2 if off == "logp" else RESHAPED[off](p)
        elif on == "shaped":
            slope = p / (p + GAMMA) / (q / (q + GAMMA)) * GAMMA / (p + GAMMA)
        else:
            slope = 1.0 if on == "logp" else RESHAPED[on](p / q)
        return -centred(g, row) * slope / 65536

    options = {"on_policy": on, "off_policy": off, "logp_weight": 0.2, "exponent": 0.3, "entropy_coef": 0.0}
    w.expect(make("luffy", **options), formula)


@pytest.mark.parametrize("k", range(8))
def test_luffy_advantages_with_k_of_seven_right_and_a_right_trace(k):
    g = group([1.0] * k + [0.0] * (7 - k), 1.0)
    kept = make("luffy", entropy_coef=0.0).assign(g, 0.0)
    if k == 7:
        assert kept == []
        assert all(row.advantage == 0 for row in g.rows)
        return
    assert kept == g.rows
    for row in g.rows:
        assert row.advantage == pytest.approx((7 - k) / 8 if row.reward else -(k + 1) / 8)


@pytest.mark.parametrize("k", range(8))
def test_a_trace_that_fails_the_verifier_is_never_pushed_up(k):
    g = group([1.0] * k + [0.0] * (7 - k), 0.0)
    make("luffy").assign(g, 0.0)
    assert g.traces[0].advantage == pytest.approx(-k / 8)


def test_luffy_bounds():
    w = guided()

    def formula(g, row, token):
        p, r = math.exp(w.now[token]), math.exp(w.now[token] - w.old[token])
        if p > 0.8 or (row.is_trace and not 0.3 <= p <= 0.7):
            return 0.0
        return -centred(g, row) * (p if row.is_trace else r) / 65536

    bounds = {"p_max": 0.8, "trace_min": 0.3, "trace_max": 0.7, "off_policy": "ratio", "entropy_coef": 0.0}
    w.expect(make("luffy", **bounds), formula)


def test_luffy_bounds_what_the_reshape_gives():
    """As the published code does: of f(p) = p / (p + gamma) at most 1/2 is p at most gamma."""
    w = guided()
    known = sorted(p for g in w.groups for row in g.traces for p in (math.exp(w.now[token]) for token in row.token_ids))
    gamma = known[len(known) // 2] + 1e-6
    for options, f in (
        ({"off_policy": "shaped"}, lambda p: p / (p + gamma)),
        ({"off_policy": "square_root", "trace_max": gamma**0.5}, math.sqrt),
        ({"off_policy": "logp", "trace_max": 0.1 * math.log(gamma)}, lambda p: 0.1 * math.log(p)),
        ({"off_policy": "p_logp", "trace_max": gamma + 0.1 * math.log(gamma)}, lambda p: p + 0.1 * math.log(p)),
    ):
        given = {"gamma": gamma, "trace_max": 0.5, "entropy_coef": 0.0} | options
        grads = w.gradients(make("luffy", **given))
        shown = {token for g in w.groups for row in g.traces if row.advantage for token in row.token_ids}
        for token in shown:
            inside = f(math.exp(w.now[token])) <= given["trace_max"]
            assert (grads[token] != 0) == inside, options
        assert 0 < sum(grads[token] != 0 for token in shown) < len(shown)


def test_luffy_weighs_traces_and_rollouts_and_leaves_out_what_was_cut():
    w = guided()
    cut = rollouts(w.groups[0])[1]
    cut.finished = False

    def formula(g, row, token):
        p, a = math.exp(w.now[token]), centred(g, row)
        if row.is_trace:
            return -2.0 * a * GAMMA * p / (p + GAMMA) ** 2 / 65536
        return 0.0 if row is cut else -0.5 * a * math.exp(w.now[token] - w.old[token]) / 65536

    options = {"trace_weight": 2.0, "rollout_weight": 0.5, "learn_cut": False, "entropy_coef": 0.0}
    w.expect(make("luffy", **options), formula)


def test_luffy_shows_traces_as_often_as_it_is_told():
    objective = make("luffy", trace_rate=0.3)
    shown = [bool(objective.choose(example(), Known(seed=seed))) for seed in range(1000)]
    assert sum(shown) / len(shown) == pytest.approx(0.3, abs=0.05)
    assert shown == [bool(objective.choose(example(), Known(seed=seed))) for seed in range(1000)]
    assert objective.rollouts(0) == 8


def test_luffy_clips_rollouts_where_it_is_asked_to():
    w = guided()

    def formula(g, row, token):
        p, a = math.exp(w.now[token]), centred(g, row)
        if row.is_trace:
            return -a * GAMMA * p / (p + GAMMA) ** 2 / 65536
        return clipped(a, math.exp(w.now[token] - w.old[token]), 0.1, 0.2) / 65536

    w.expect(make("luffy", clip_low=0.1, clip_high=0.2, entropy_coef=0.0), formula)


def test_rl_with_an_sft_loss():
    w = guided()
    shown = tokens(row for g in w.groups for row in g.traces)

    def formula(g, row, token):
        if row.is_trace:
            return -0.7 / shown
        return -centred(g, row, rollouts(g)) * math.exp(w.now[token] - w.old[token]) / 65536

    w.expect(make("rl_sft", coef=0.7, entropy_coef=0.0), formula)


@pytest.mark.parametrize("threshold", [0, 1])
def test_hpt_imitates_what_fails(threshold):
    w = guided()
    fails = [g for g in w.groups if sum(row.solved for row in rollouts(g)) <= threshold]
    shown = tokens(row for g in fails for row in g.traces)
    assert len(fails) == (1, 3)[threshold]

    def formula(g, row, token):
        if any(g is failing for failing in fails):
            return -1 / shown if row.is_trace else 0.0
        return 0.0 if row.is_trace else -centred(g, row, rollouts(g)) * math.exp(w.now[token] - w.old[token]) / 65536

    w.expect(make("hpt", threshold=threshold, entropy_coef=0.0), formula)


@pytest.mark.parametrize(("progress", "mu"), [(0.05, 0.2), (0.1, 0.4), (0.55, 0.25), (1.0, 0.1)])
@pytest.mark.parametrize("phi", [True, False])
def test_chord(progress, mu, phi):
    w = guided()
    shown = tokens(row for g in w.groups for row in g.traces)
    count = tokens(row for g in w.groups for row in rollouts(g))

    def formula(g, row, token):
        p, r = math.exp(w.now[token]), math.exp(w.now[token] - w.old[token])
        if row.is_trace:
            return -mu * (p * (1 - p) if phi else 1.0) / shown
        return (1 - mu) * clipped(standard(g, row, rollouts(g)), r, 0.2, 0.2) / count

    objective = make("chord", mu_peak=0.4, mu_valley=0.1, warmup=0.1, phi=phi)
    w.expect(objective, formula, progress)


def test_srft():
    w = guided()
    count = tokens(row for g in w.groups for row in g.rows)

    def formula(g, row, token):
        p, h = math.exp(w.now[token]), fmean(w.entropy[t] for t in row.token_ids)
        if row.is_trace:
            return (-centred(g, row) * GAMMA * p / (p + GAMMA) ** 2 - 0.5 * math.exp(-h)) / count
        return (-0.1 * math.exp(h) if row.solved else 1.0) / count

    w.expect(make("srft"), formula)

    def by_rows(g, row, token):
        return formula(g, row, token) * count / len(row.token_ids) / sum(len(g.rows) for g in w.groups)

    w.expect(make("srft", normalizer="sequences"), by_rows)


def test_asymre():
    w = guided()
    count = tokens(row for g in w.groups for row in g.rows)
    w.expect(make("asymre", traces=1, shift=-0.2), lambda g, row, token: -(centred(g, row) + 0.2) / count)


def test_topr():
    w = guided()
    count = tokens(row for g in w.groups for row in g.rows)

    def formula(g, row, token):
        if row.reward:
            return -row.reward / count
        return 0.0 if row.is_trace else min(1.0, math.exp(w.row_sum(row, w.mu))) / count

    w.expect(make("topr", traces=1), formula)


def test_oapl():
    w = plain()
    count = tokens(row for g in w.groups for row in g.rows)

    def formula(g, row, token):
        value = 0.5 * math.log(fmean(math.exp(r.reward / 0.5) for r in g.rows))
        return 2 * 0.2 * (0.2 * w.row_sum(row, w.mu) - (row.reward - value)) / count

    w.expect(make("oapl", beta1=0.5, beta2=0.2), formula)


def test_the_pessimistic_objective():
    w = plain()
    count = tokens(row for g in w.groups for row in g.rows)

    def formula(g, row, token):
        return -(centred(g, row) + 0.3 - 0.2 * w.row_sum(row, w.mu)) / count

    w.expect(make("pessimistic", beta=0.2, shift=0.3), formula)


def test_sft_imitates_wrong_traces_unless_told_to_filter():
    for filtered in (False, True):
        w = guided()
        kept = [row for g in w.groups for row in g.traces if row.solved or not filtered]
        assert len(kept) == (2 if filtered else 3)

        def formula(g, row, token, kept=kept):
            return -1 / tokens(kept) if any(row is one for one in kept) else 0.0

        for g in w.groups:
            g.rows = g.traces
        w.expect(make("sft", trace_filter=filtered), formula)


@pytest.mark.parametrize("name", KNOWN)
def test_rows_add_up(name):
    """A problem that lacks traces gets a rollout for each; every method says by what its success is judged."""
    objective = make(name)
    options = objective.options
    for traces in (2, 0):
        shown = len(objective.choose(example(traces), Known()))
        assert shown == min(traces, options.shown)
        assert objective.rollouts(shown) == (0 if name == "sft" else options.sampled + options.shown - shown)
    module = __import__(find(name).__module__, fromlist=["_"])
    assert "Criterion" in module.__doc__
    assert make("luffy", traces=3).rollouts(2) == 6


def test_which_traces_a_problem_is_shown():
    made = Example(example().problem, (1, 2, 3), ((1,) * 5, (2,) * 2, (3,) * 9, (4,) * 3))

    def chosen(seed: int = 0, **options) -> list[int]:
        known = Known(seed=seed, right=[False, True, True, False], logp=[-2.0, -1.0, -4.0, -3.0])
        return [made.traces[at][0] for at in make("luffy", **options).choose(made, known)]

    assert chosen() == [1]
    assert chosen(traces=2) == [1, 2]
    assert chosen(traces=2, trace_choice="shortest") == [2, 4]
    assert chosen(traces=3, trace_choice="longest") == [3, 1, 4]
    assert chosen(traces=4, trace_tokens=8) == [1, 2]  # the third does not fit, nor then the fourth
    assert chosen(traces=4, trace_choice="longest", trace_tokens=8) == [1, 4]
    assert chosen(trace_tokens=1) == []
    drawn = [chosen(seed, traces=2, trace_choice="random") for seed in range(40)]
    assert drawn[0] == chosen(0, traces=2, trace_choice="random")
    assert {number for pair in drawn for number in pair} == {1, 2, 3, 4}
    assert all(len(set(pair)) == 2 for pair in drawn)
    random = make("luffy", trace_choice="random", trace_tokens=5)
    assert random.may_choose(made) == [0, 1, 3]
    assert chosen(traces=4, trace_right=True) == [2, 3]
    assert chosen(trace_choice="shortest", trace_right=True) == [2]
    assert chosen(traces=2, trace_choice="likely") == [2, 1]
    assert chosen(traces=2, trace_choice="unlikely") == [3, 4]
    for name in ("luffy", "srft", "topr"):
        with pytest.raises(ValueError, match="traces must be fewer than rows, got 8 of 8"):
            make(name, traces=8)


def test_traces_of_several_teachers():
    traces = tuple((number,) * number for number in range(1, 7))
    made = Example(example().problem, (1, 2, 3), traces, ("a", "a", "b", "b", "c", "c"))

    def chosen(seed: int = 0, progress: float = 0.0, **options) -> list[int]:
        known = Known(seed=seed, progress=progress)
        return [at + 1 for at in make("luffy", **options).choose(made, known)]

    assert chosen(traces=6, trace_per_teacher=1) == [1, 3, 5]
    assert chosen(traces=3, trace_per_teacher=2, trace_choice="longest") == [6, 5, 4]
    assert chosen(traces=6, teacher_weights={"a": 0.0}) == [3, 4, 5, 6]
    weighted = {"trace_choice": "random", "teacher_weights": {"a": 8.0, "b": 0.0}}
    drawn = [chosen(seed, **weighted)[0] for seed in range(2000)]
    # of the first draw: a has 8 of each 9 parts, between two traces each, b none, c what is left
    assert sum(number in (1, 2) for number in drawn) / 2000 == pytest.approx(8 / 9, abs=0.03)
    assert sum(number in (3, 4) for number in drawn) == 0
    assert sum(number == 1 for number in drawn) / 2000 == pytest.approx(4 / 9, abs=0.04)
    assert [chosen(progress=p, trace_choice="curriculum")[0] for p in (0.0, 0.5, 0.99)] == [1, 4, 6]
    assert chosen(progress=0.99, traces=3, trace_choice="curriculum") == [4, 5, 6]
    assert chosen(traces=6, trace_choice="curriculum", progress=0.5) == [1, 2, 3, 4, 5, 6]


def test_luffy_compares_with_the_teacher_where_the_data_say_what_it_thought():
    for choice, formula in (
        ("teacher", lambda p, q: p / (q + 1e-6)),
        ("shaped_teacher", lambda p, q: GAMMA * (p / q) / (p / q + GAMMA) ** 2),
    ):
        w = guided()
        told, untold = w.groups[0].traces[0], w.groups[1].traces[0]
        told.behaviour = tuple(-0.1 * n for n in range(1, 1 + len(told.token_ids)))
        q = dict(zip(told.token_ids, map(math.exp, told.behaviour), strict=True))

        def gradient(g, row, token, formula=formula, w=w, q=q, told=told):
            p = math.exp(w.now[token])
            if not row.is_trace:
                slope = math.exp(w.now[token] - w.old[token])
            elif row is told:
                slope = formula(p, q[token])
            else:
                slope = GAMMA * p / (p + GAMMA) ** 2
            return -centred(g, row) * slope / 65536

        w.expect(make("luffy", off_policy=choice, entropy_coef=0.0), gradient)
        assert centred(w.groups[1], untold)
    objective = make("luffy", off_policy="teacher")
    with pytest.raises(UserError, match="of 2 problems with traces none has its log-probs"):
        objective.prepare([example(), example(), example(0)])
    assert load_config("quickstart", ["--objective.off_policy=teacher"]).first_pass
    assert not load_config("quickstart").first_pass


def prefixed(*lengths: int) -> World:
    """Rollouts of which the last ones begin with so many tokens of a trace."""
    g = group([1.0, 0.0, 0.0, 1.0, 0.0])
    for row, length in zip(reversed(g.rows), lengths, strict=False):
        row.prefix = length
    return World([g])


def prefix_of(row: Row) -> tuple[int, ...]:
    return row.token_ids[: row.prefix]


def test_prefix_rft_learns_of_a_prefix_where_it_is_unsure():
    w = prefixed(5, 4)
    learned = {max(prefix_of(row), key=w.entropy.__getitem__) for row in w.groups[0].rows if row.prefix}
    assert len(learned) == 2  # 0.2 of 5 and of 4 tokens, rounded up

    def formula(g, row, token):
        silent = token in prefix_of(row) and token not in learned
        return 0.0 if silent else -centred(g, row) * math.exp(w.now[token] - w.old[token]) / 65536

    w.expect(make("prefix_rft", entropy_coef=0.0), formula)
    assert centred(w.groups[0], w.groups[0].rows[-1])  # else the learned token would say nothing
    found = w.gradients(make("prefix_rft", unsure=0.0))
    assert not any(found[token] for row in w.groups[0].rows for token in prefix_of(row))


def test_the_highest_of_a_row_are_found_whichever_ranks_hold_them():
    ranks.run(2, highest_of_shared_rows)


def highest_of_shared_rows(rank: int, world: int) -> None:
    values, among = torch.tensor([0.5, 3.0, 1.0, 2.0, 9.0, 4.0, 7.0]), torch.tensor([1, 1, 1, 1, 0, 1, 1]).bool()
    rows, mine = torch.tensor([0, 0, 0, 0, 0, 1, 1]), (slice(0, 3), slice(3, 7))[rank]
    layout = SimpleNamespace(group=dist.group.WORLD)
    micro = SimpleNamespace(row=rows[mine], num_rows=2, layout=layout)
    want = torch.tensor([0, 1, 0, 1, 0, 0, 1]).bool()  # two of four, one of two
    assert torch.equal(highest(values[mine], among[mine], micro, 0.5), want[mine])


def test_prefix_rft_gives_less_of_a_trace_as_the_run_goes_on():
    objective, e = make("prefix_rft"), Example(example().problem, (1,), ((4,) * 100,))
    given = [objective.prefixes(e, Known(progress=p)) for p in (0.0, 0.5, 1.0)]
    assert given == [[(0, 95)], [(0, 50)], [(0, 5)]]
    assert objective.prefixes(example(0), Known()) == []
    several = Example(example().problem, (1,), ((4,) * 10, (5,) * 20, (6,) * 30))
    chosen = make("prefix_rft", traces=2, trace_choice="longest").prefixes(several, Known(progress=0.5))
    assert chosen == [(2, 15), (1, 10)], "a rollout for each trace"


def test_uft_learns_of_one_hint_by_its_likelihood_alone():
    w = prefixed(*[1] * 5)
    [hinted, *_] = w.groups[0].rows
    total = sum(len(row.token_ids) - (row is not hinted) for row in w.groups[0].rows)

    def formula(g, row, token):
        if token in prefix_of(row):
            return -0.001 / total if row is hinted else 0.0
        return -centred(g, row) * math.exp(w.now[token] - w.old[token]) / total

    options = {"normalizer": "tokens", "advantage_std": False, "clip_low": None, "clip_high": None}
    w.expect(make("uft", **options), formula)
    for row in w.groups[0].rows:
        row.reward = 0.0  # no advantage: the hint is learned all the same
    w.expect(make("uft", **options), formula)


def test_ufts_hints_are_shared_by_a_group_and_end():
    objective, e = make("uft", rows=4), Example(example().problem, (1,), ((4,) * 1000,))
    for progress, share in ((0.0, 0.95), (0.25, 0.5), (0.499, 0.05)):
        found = objective.prefixes(e, Known(seed=3, progress=progress))
        assert len(found) == 4
        assert len(set(found)) == 1
        assert found[0][1] == pytest.approx(1000 * share, abs=50)
    assert objective.prefixes(e, Known(seed=3)) != objective.prefixes(e, Known(seed=4)), "the length is drawn"
    assert objective.prefixes(e, Known(progress=0.5)) == []
    several = Example(example().problem, (1,), ((4,) * 10, (5,) * 20))
    assert {at for at, _ in make("uft", trace_choice="longest").prefixes(several, Known())} == {1}


def test_bread_learns_nothing_of_a_prefix():
    w = prefixed(*[1] * 5)

    def formula(g, row, token):
        if token in prefix_of(row):
            return 0.0
        r = math.exp(w.now[token] - w.old[token])
        return clipped(standard(g, row), r, 0.2, 0.2) / len(g.rows) / (len(row.token_ids) - 1)

    w.expect(make("bread", normalizer="sequences"), formula)
    assert not set(w.gradients(make("bread"))) & {token for row in w.groups[0].rows for token in prefix_of(row)}


def test_relift_learns_from_rollouts_and_then_imitates_what_none_solved():
    groups = [group(rewards, first=first) for rewards, first in (([1.0, 0.0], 10), ([0.0, 0.0], 100), ([0.0] * 3, 200))]
    for index, g in enumerate(groups):
        g.example, g.index = example(), index
    w, objective = World(groups), make("relift", rows=2, entropy_coef=0.0, normalizer=100.0, demonstrations=2)
    w.expect(objective, lambda g, row, token: -centred(g, row) * math.exp(w.now[token] - w.old[token]) / 100)
    objective.prepare([example()] * 3)
    [terms] = objective.extra(groups, 0.0)
    assert [g.index for g in terms.groups] == [1, 2]
    assert [row.token_ids for rows in terms.rows for row in rows] == [(4, 5, 0)] * 2
    assert terms.extra
    logp = torch.tensor([-0.5, -1.0, -2.0] * 2, dtype=torch.float64, requires_grad=True)
    [micro] = pack(terms.groups, lambda g: g.rows, 1000)
    given = {"loss_id": micro.loss_id, "advantages": micro.advantages.double(), "token_weight": micro.token_weight}
    loss = token_loss(logp, losses=objective.losses, old_logp=logp.detach(), **given).loss.sum() / terms.normalizer
    assert torch.allclose(torch.autograd.grad(loss, logp)[0], torch.full((6,), -1 / 6, dtype=torch.float64))
    assert not objective.buffer


def test_relifts_buffer_waits_and_survives():
    failed = [group([0.0, 0.0], first=first) for first in (10, 20)]
    for index, g in enumerate(failed):
        g.example, g.index = example(index), index  # the first has no trace
    objective = make("relift", rows=2, demonstrations=2)
    assert objective.extra(failed, 0.0) == []
    assert objective.extra(failed, 0.1) == [], "who waits already does not wait twice"
    again = make("relift", rows=2, demonstrations=2)
    again.load_state(objective.state())
    assert again.buffer == objective.buffer == [(1, 0)]
    again.prepare([example()] * 4)
    failed[1].index = 3
    [terms] = again.extra(failed, 0.2)
    assert [g.index for g in terms.groups] == [1, 3]


def test_sort_weighs_by_what_a_plan_makes_likely():
    w = guided()
    imitated = w.groups[1].traces[0]  # of the group that no rollout solves
    planned = {token: -0.3 - 0.2 * n for n, token in enumerate(imitated.token_ids)}
    imitated.behaviour = tuple(planned.values())

    def formula(g, row, token):
        if row.is_trace:
            return -0.7 * math.sqrt(math.exp(w.now[token] + planned[token])) / len(planned) if row is imitated else 0.0
        return -centred(g, row, rollouts(g)) * math.exp(w.now[token] - w.old[token]) / 50

    w.expect(make("sort", normalizer=50.0, coef=0.7), formula)
    imitated.behaviour = ()  # too long a plan: p itself
    planned = {token: w.now[token] for token in planned}
    w.expect(make("sort", normalizer=50.0, coef=0.7), formula)


def test_taking_a_trace_after_grading_knows_neither_verdicts_nor_perplexities():
    for name in ("relift", "bread"):
        for option in ({"trace_right": True}, {"trace_choice": "likely"}):
            with pytest.raises(ValueError, match=f"{name} takes a trace after its rollouts are graded"):
                make(name, **option)
    make("relift", trace_choice="curriculum")
    with pytest.raises(ValueError, match="among first, random, shortest, longest, got"):
        make("bread", trace_choice="curriculum")


def test_weights_of_teachers_that_do_nothing_are_refused():
    with pytest.raises(ValueError, match=r'need trace_choice = "random", got \{.a.: 2.0\} with "first"'):
        make("luffy", teacher_weights={"a": 2.0, "b": 0.0})
    of_a = dataclasses.replace(example(1), teachers=("a",))
    with pytest.raises(UserError, match="teacher_weights names 'A', and the data have traces a"):
        make("luffy", teacher_weights={"A": 0.0}).prepare([of_a])
    with pytest.raises(UserError, match=r"none of the 2 problems.*1 have traces, which objective.trace_tokens or"):
        make("luffy", teacher_weights={"a": 0.0}).prepare([of_a, example(0)])


def test_a_ratio_is_not_corrected_twice():
    for name in ("topr", "oapl", "pessimistic"):
        with pytest.raises(UserError, match=f'correction.kind must be "none" with {name}'):
            load_config("quickstart", ["--objective.name", name, "--correction.kind", "truncate"])


def test_replay_of_groups_without_rollouts():
    objective = make("exgrpo", start=0.0)
    objective.observe([])
    assert not objective.started
    objective.started = True
    objective.observe([Group(example=example(0), index=3)])
    assert not objective.replay.retired


def test_chord_leaves_traces_out_while_their_weight_is_zero():
    terms = make("chord").terms(guided().groups, 0.0)
    assert not any(row.is_trace for rows in terms.rows for row in rows)
    assert any(row.is_trace for rows in make("chord").terms(guided().groups, 0.05).rows for row in rows)


def test_sorts_room_for_a_plan():
    assert make("sort", plan_tokens=40).scored(example(2)) == 43


def test_sorts_plan_is_the_datas_or_else_the_answer():
    objective = make("sort")
    assert objective.hint(example()) == "The answer is 1."
    planned = example()
    planned.problem.extra["plan"] = "First add, then halve."
    assert objective.hint(planned) == "First add, then halve."


def test_luffy_divides_as_published_with_parity():
    w = guided()
    terms = make("luffy", parity=True, entropy_coef=0.001).terms(w.groups, 0.0)
    rows = [row for g in w.groups for row in g.rows]
    # 8 GPUs, each with an eighth of the tokens, far below 32768: one micro-batch; the bonus is a mean over tokens
    assert terms.normalizer == 8 * 8192
    assert terms.entropy_coef / terms.normalizer == pytest.approx(0.001 / tokens(rows))
    long = Row(token_ids=(7,) * (8 * 32768 - 8), text="")  # the answers fill one micro-batch, prompts need another
    many = Group(example=example(), rows=[long, Row(token_ids=(8,) * 8, text="", reward=1.0)])
    terms = make("luffy", parity=True, entropy_coef=0.001).terms([many], 0.0)
    assert terms.entropy_coef / terms.normalizer == pytest.approx(0.001 * 2 / (8 * 32768))
    with pytest.raises(ValueError, match="normalizer is 65536 with parity"):
        make("luffy", parity=True, normalizer=8192.0)


@pytest.mark.parametrize("name", [name for name in KNOWN if getattr(options_of(name).model_validate({}), "traces", 0)])
def test_data_without_traces_are_refused(name):
    with pytest.raises(UserError, match="learns from traces, and none of the 3 problems has one"):
        make(name).prepare([example(0)] * 3)
    make(name).prepare([example(0), example(1)])


def test_an_option_that_would_do_nothing_is_refused(tmp_path):
    for name, option in (("topr", "clip_low"), ("oapl", "advantage_std"), ("cispo", "clip_low"), ("srft", "clip_high")):
        with pytest.raises(ValueError, match=option):
            make(name, **{option: 0.5})
    (tmp_path / "mine.toml").write_text("[objective]\ngama = 0.2\n")  # also where another objective is asked for
    with pytest.raises(UserError, match=r"unknown key 'objective.gama'.*did you mean objective.gamma"):
        load_config(str(tmp_path / "mine.toml"), ["--objective.name", "dapo"])


@pytest.mark.parametrize("name", KNOWN)
def test_groups_without_anything_to_learn_from_do_no_harm(name):
    objective = make(name)
    empty = objective.terms([Group(example=example(0))], 0.5)
    assert empty.rows == [[]]
    assert empty.normalizer > 0
    assert math.isfinite(empty.entropy_coef)


def test_rows_without_gradient_stay_out_unless_an_entropy_bonus_reaches_them():
    for coef, want in ((0.0, 0), (0.001, 8)):
        assert len(make("grpo", entropy_coef=coef).assign(group([1.0] * 8), 0.0)) == want


def test_the_entropy_bonus_is_a_mean_over_tokens_whatever_the_normalizer():
    groups = [group([1.0, 0.0]), group([1.0, 1.0], first=100)]
    for normalizer, divisor in ((8192.0, 8192.0), ("tokens", 10.0), ("sequences", 4.0)):
        terms = make("dr_grpo", normalizer=normalizer, entropy_coef=0.01).terms(groups, 0.0)
        assert terms.normalizer == divisor
        assert terms.entropy_coef / terms.normalizer == pytest.approx(0.01 / 10)


BY_ROWS = [name for name in KNOWN if name not in ("ppo", "prime")]  # those ask networks beside the policy


@pytest.mark.parametrize("coef", ["entropy_coef", "kl_coef"])
@pytest.mark.parametrize("name", [name for name in BY_ROWS if "kl_coef" in options_of(name).model_fields])
def test_a_term_of_every_token_is_a_mean_over_those_that_enter(name, coef):
    """Also where every group fails, and what is learned from is not what is counted."""
    for groups in (guided().groups, [group([0.0] * 3, 1.0), group([0.0] * 2, 1.0, first=100)]):
        terms = make(name, **{coef: 0.01}).terms(groups, 0.5)
        entering = sum(row.num_targets for rows in terms.rows for row in rows)
        assert entering, name
        assert getattr(terms, coef) / terms.normalizer == pytest.approx(0.01 / entering)


def test_standard_deviation_only_when_asked_for():
    assert group_advantages([1.0, 0.0]) == [0.5, -0.5]
    assert group_advantages([1.0, 0.0], divide_by_std=True) == pytest.approx(
        [0.5 / 0.5**0.5, -0.5 / 0.5**0.5], rel=1e-4
    )
    assert group_advantages([0.3] * 3, divide_by_std=True) == [0.0] * 3
    assert group_advantages([]) == []


def test_one_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "halved.py").write_text(  # a name that no other test has
        "from typing import Literal\n"
        "from luffy.objectives.grpo import Grpo, RatioOptions\n"
        "class Halved(Grpo):\n"
        "    class Options(RatioOptions):\n"
        "        name: Literal['halved:Halved'] = 'halved:Halved'\n"
        "        factor: float = 0.5\n"
        "    def rewards(self, group):\n"
        "        return [self.options.factor * row.reward for row in group.rows]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])  # as an installed command has it
    config = load_config("quickstart", ["--objective.name", "halved:Halved", "--objective.factor", "0.25"])
    assert config.objective.factor == 0.25
    assert config.objective.rows == 4  # of the recipe, for it has such an option; gamma it has not
    g = group([1.0, 0.0])
    make_objective(config.objective).assign(g, 0.0)
    assert [row.advantage for row in g.rows] == [0.125, -0.125]
    for name, words in (
        ("halved:Other", "cannot be imported"),
        ("mine", "known: luffy"),
        ("luffi", "did you mean luffy"),
        ("grp0", "did you mean grpo"),
        ("nope", "known: luffy, grpo"),
    ):
        with pytest.raises(UserError, match=words):
            load_config("quickstart", ["--objective.name", name])
