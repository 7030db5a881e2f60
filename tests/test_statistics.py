"""Statistics of evaluations, against closed forms, enumeration and simulation."""

import itertools
import math
from statistics import NormalDist, fmean

import numpy as np
import pytest

from luffy.evaluation import statistics
from luffy.evaluation.statistics import difference, interval, majority, pass_at_k, wilson


@pytest.mark.parametrize(("n", "c"), [(4, 0), (4, 1), (5, 2), (6, 6), (1, 1), (7, 3)])
def test_pass_at_k_is_the_mean_over_all_draws(n, c):
    answers = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        draws = [any(draw) for draw in itertools.combinations(answers, k)]
        assert pass_at_k(c, n, k) == pytest.approx(fmean(draws)), k
    assert pass_at_k(c, n, 1) == pytest.approx(c / n)


def test_pass_at_k_is_unbiased():
    """1 - (1 - c / n)^k is not: eq. 1's reason to be."""
    p, n, k = 0.2, 8, 4
    counts = np.random.default_rng(0).binomial(n, p, 40_000)
    truth = 1 - (1 - p) ** k
    assert fmean(pass_at_k(int(c), n, k) for c in counts) == pytest.approx(truth, abs=0.005)
    assert fmean(1 - (1 - c / n) ** k for c in counts) < truth - 0.03


def test_pass_at_k_needs_as_many_answers():
    with pytest.raises(ValueError, match=r"pass@5: needs 1 to 4 answers.*--n"):
        pass_at_k(1, 4, 5)
    with pytest.raises(ValueError, match="pass@0"):
        pass_at_k(1, 4, 0)
    assert pass_at_k(500, 1000, 999) == 1.0  # no overflow


def test_the_majority():
    right = {"2": True, "3": False, "4": False}
    assert majority(["2", "2", "3"], right) == 1
    assert majority(["3", "3", "2"], right) == 0
    assert majority(["2", "3"], right) == 0.5
    assert majority(["2", "2", "3", "3", "4", "4"], right) == pytest.approx(1 / 3)
    assert majority([None, None, None, "2"], right) == 1  # what says nothing has no vote
    assert majority([None], right) == 0


def test_wilson_is_the_score_tests_inverse():
    """The p at which |p_hat - p| = z sqrt(p (1 - p) / n)."""
    z = NormalDist().inv_cdf(0.975)
    for c, n in [(3, 10), (0, 20), (17, 40), (40, 40)]:
        for p in wilson(c, n):
            if 1e-9 < p < 1 - 1e-9:
                assert abs(c / n - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n))
    assert wilson(0, 20)[0] == 0
    assert wilson(40, 40)[1] == pytest.approx(1)


def test_students_quantile():
    for freedom, value in [(1, 12.7062), (2, 4.3027), (5, 2.5706), (29, 2.0452), (499, 1.9647)]:  # tables
        assert statistics._t(0.975, freedom) == pytest.approx(value, abs=4e-3)


def test_an_interval_of_many_problems_is_the_normal_one():
    scores = np.random.default_rng(1).beta(2, 3, 2000)
    half = 1.96 * scores.std(ddof=1) / math.sqrt(2000)
    assert interval([scores]) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.05 * half)


def test_an_average_weighs_benchmarks_equally():
    rng = np.random.default_rng(2)
    few, many = rng.beta(1, 1, 40), rng.beta(1, 3, 4000)
    low, high = interval([few, many])
    assert (low + high) / 2 == pytest.approx((few.mean() + many.mean()) / 2, abs=0.01)
    spread = 1.96 * math.sqrt(few.var(ddof=1) / 40 + many.var(ddof=1) / 4000) / 2
    assert (high - low) / 2 == pytest.approx(spread, rel=0.1)


def test_answers_to_one_problem_are_no_sample_of_problems():
    """32 answers that agree make no interval narrower."""
    once = np.random.default_rng(3).integers(0, 2, 30).astype(float)
    low, high = interval([once * 0.999])  # no longer 0 or 1, and so not Wilson's
    assert high - low == pytest.approx(interval([once])[1] - interval([once])[0], rel=0.2)


def test_where_nothing_differs():
    assert interval([[0.0] * 30]) == wilson(0, 30)
    for benchmarks in (
        [[1.0] * 30, [0.0] * 1000],
        [[1.0] * 4, [0.0] * 60],
        [[1.0] * 30, [1.0] * 20],
        [[0.0] * 30, [0.0, 1.0] * 15],
    ):
        low, high = interval(benchmarks)
        assert low <= fmean(map(fmean, benchmarks)) <= high
        assert high - low > 0.05
    assert interval([[0.0] * 30] * 6)[0] == 0  # what is added for its variance does not add to the mean
    assert interval([[1.0] * 100, [1.0] * 500])[1] == 1
    mean, low, high, p = difference([[1.0, 0.0]], [[1.0, 0.0]])
    assert (mean, p) == (0, 1)
    assert low < 0 < high
    mean, low, high, p = difference([[1.0] * 20], [[0.0] * 20])  # every problem alike, and yet twenty alone
    assert (mean, high) == (1, 1)
    assert 0.4 < low < 0.9
    assert p < 0.001
    mean, low, high, _ = difference([[1.0] * 100, [1.0] * 30], [[0.01] * 100, [0.01] * 30])
    assert low < mean < high  # what is added for its variance does not move the mean
    none = difference([[0.0] * 30], [[0.0] * 30])
    assert none[1] == pytest.approx(-none[2], abs=0.02)
    assert 0.1 < none[2] < 0.3


MODELS = [
    ("answers of one kind", [30], 8, (0.5, 0.5)),
    ("one answer", [30], 1, (1, 1)),
    ("one answer to many", [500], 1, (2, 1)),
    ("hard", [30], 8, (0.3, 1.5)),
    ("minerva's size", [272], 4, (0.5, 1)),
    ("three benchmarks", [30, 83, 500], 4, (0.5, 0.5)),
    ("three hard ones", [30, 30, 83], 8, (0.3, 1)),
]
NEARLY_ALL = [
    ("nearly all wrong", [30], 8, (1, 60)),
    ("nearly all right", [30], 8, (980, 20)),
    ("a few solved always", [500], 4, (0.05, 5)),
    ("two of them", [30, 30], 8, (0.1, 3)),
    ("six with one answer", [30] * 6, 1, (200, 9800)),
    ("three nearly solved", [100, 200, 500], 1, (9850, 150)),
]


def coverage(sizes, n: int, beta, trials: int, seed: int) -> float:
    """Share of intervals that hold the mean of a population of difficulties, of which problems are drawn."""
    rng, truth, covered = np.random.default_rng(seed), beta[0] / sum(beta), 0
    for trial in range(trials):
        drawn = [rng.binomial(n, rng.beta(*beta, size)) / n for size in sizes]
        low, high = interval(drawn, seed=trial)
        covered += low <= truth <= high
    return covered / trials


@pytest.mark.parametrize(("sizes", "n", "beta"), [model[1:] for model in MODELS], ids=[model[0] for model in MODELS])
def test_95_percent_intervals_cover_95_percent(monkeypatch, sizes, n, beta):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    assert 0.93 <= coverage(sizes, n, beta, 1500, 4) <= 0.97


@pytest.mark.parametrize(("sizes", "n", "beta"), [m[1:] for m in NEARLY_ALL], ids=[m[0] for m in NEARLY_ALL])
def test_intervals_do_not_collapse_near_0_and_1(monkeypatch, sizes, n, beta):
    """Where a few problems say all: percentiles alone hold the mean 91 to 94 times of 100; too wide is better."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    assert coverage(sizes, n, beta, 600, 7) >= 0.935


def test_one_problem_that_differs():
    low, high = interval([[0.0] * 29 + [1 / 8]])
    assert low == 0
    assert 0.02 < high < 0.03  # a percentile is 0.0125


def test_the_worst_that_the_docs_admit(monkeypatch):
    """Thirty problems of which nearly all are hopeless and some few solved always."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    assert 0.86 <= coverage([30], 32, (0.03, 0.6), 600, 1) <= 0.92


def test_two_equal_models_differ_in_5_of_100():
    rng, below, covered, trials = np.random.default_rng(5), 0, 0, 400
    for seed in range(trials):
        p = rng.beta(0.5, 0.5, 60)
        mean, low, high, value = difference([rng.binomial(4, p) / 4], [rng.binomial(4, p) / 4], seed=seed)
        below += value <= 0.05
        covered += low <= 0 <= high
        assert low <= mean <= high
    assert 0.02 <= below / trials <= 0.08
    assert 0.92 <= covered / trials <= 0.98


def test_a_difference_on_few_problems_is_no_certain_one(monkeypatch):
    """One problem of forty, or two: percentiles alone hold the mean 88 times of 100."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng, covered, trials, truth = np.random.default_rng(8), 0, 600, 0.03 * 2 / 32
    for seed in range(trials):
        p = rng.beta(30, 2, 40)
        ours, theirs = rng.binomial(1, p + 0.03 * (1 - p)), rng.binomial(1, p)
        _, low, high, _ = difference([ours], [theirs], seed=seed)
        covered += low <= truth <= high
    assert 0.93 <= covered / trials <= 0.98
    _, low, high, _ = difference([[1.0] + [0.0] * 29], [[0.0] * 30])
    assert low < 0 < high


def test_a_paired_test_sees_what_two_intervals_do_not():
    """Of hard and easy problems, where one model is a little better on each."""
    rng = np.random.default_rng(6)
    p = rng.beta(0.5, 0.5, 200) * 0.9
    ours, theirs = rng.binomial(16, p + 0.05) / 16, rng.binomial(16, p) / 16
    mean, low, high, value = difference([ours], [theirs])
    assert 0.02 < low < mean < high < 0.08
    assert value < 0.001
    (_, top), (bottom, _) = interval([theirs]), interval([ours])
    assert bottom < top
    back = difference([theirs], [ours])
    assert back[0] == -mean
    assert back[3] == pytest.approx(value, abs=0.001)


def test_p_of_an_average_is_that_of_its_benchmarks_together():
    """Every sign counted: four problems in each of two benchmarks, with differences 1, 1, 1, 0 and 1, 0, 0, -1."""
    ours, theirs = [[1, 1, 1, 0], [1, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 1]]
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    flipped = signs @ np.array([1, 1, 1, 0, 1, 0, 0, -1])
    exact = np.mean(np.abs(flipped) >= 3)
    mean, _, _, value = difference(ours, theirs)
    assert mean == pytest.approx(3 / 8)
    assert value == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("scores", [[], [[]], [[0.0, math.nan]]])
def test_what_is_no_score(scores):
    with pytest.raises(ValueError, match="numbers for scores"):
        interval(scores)
    with pytest.raises(ValueError, match="numbers for scores"):
        difference(scores, scores)


def test_pairs_are_of_the_same_problems():
    with pytest.raises(ValueError, match="same problems"):
        difference([[0.5, 1.0]], [[0.5]])
