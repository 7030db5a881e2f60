"""What n answers to each of many problems say about a model.

Problems are the sample and answers are measurements of them: intervals and tests resample problems, with all their
answers. An average over benchmarks resamples the problems of each, and weighs benchmarks equally.

    P problems, n answers to each, R resamples
"""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist, fmean

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
FEW = 5
"""Problems on which two models differ."""
BLOCK = 1 << 22
"""Draws that are held at a time."""


def pass_at_k(right: int, answers: int, k: int) -> float:
    """Chance that one of k answers, drawn from these without replacement, is right (arXiv 2107.03374, eq. 1).

    Raises ValueError where k is more than there are.
    """
    if not 1 <= k <= answers:
        raise ValueError(f"pass@{k}: needs 1 to {answers} answers to a problem, which has {answers}; sample more (--n)")
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)


def majority(votes: Sequence[Hashable], right: Mapping[Hashable, bool]) -> float:
    """maj@n: whether the answer that is given most often is right; of answers that are given equally often, the share
    that is. None votes for nothing, and without any vote nothing is right (arXiv 2203.11171)."""
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    return fmean(bool(right[vote]) for vote, count in counts.items() if count == most)


def interval(benchmarks: Sequence[Sequence[float]], confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the unweighted mean over benchmarks of the mean over their problems.

    Args:
        benchmarks: of each, [P] scores of its problems (with n answers to each: their mean), from 0 to 1.

    The percentiles are widened as Student's t is against the normal distribution, and by the n / (n - 1) of a variance
    ("expanded percentile", arXiv 1411.5279, section 4.3.3): with thirty problems plain ones cover too little. Scores of
    one benchmark that are all 0 or 1 get Wilson's interval, and no interval is narrower than Wilson's with as many
    problems as give the variance that was seen (Korn and Graubard, Survey Methodology 24, 1998): near 0 and 1
    percentiles fall short. Of several, one whose problems do not differ varies as if it had two more of either kind, as
    Agresti and Coull have it: that nothing differs here does not say that nothing will.

    Raises:
        ValueError: no benchmark, one without problems, or a score that is no number.
    """
    every = _checked("interval", benchmarks)
    if len(every) == 1 and bool(np.isin(every[0], (0, 1)).all()):
        return wilson(float(every[0].sum()), len(every[0]), confidence)
    mean = float(np.mean([scores.mean() for scores in every]))
    varied = [np.append(scores, (0, 0, 1, 1)) if np.ptp(scores) == 0 else scores for scores in every]
    low, high = _percentiles(varied, mean, confidence, seed)
    least, most = _effective(varied, mean, confidence)
    return max(0.0, min(low, least)), min(1.0, max(high, most))


def difference(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], confidence: float = 0.95, seed: int = 0
) -> tuple[float, float, float, float]:
    """(mean of ours - theirs, low, high, p) on the same problems of the same benchmarks.

    low, high: percentiles as of `interval`, of the differences by problem. A benchmark whose problems all differ alike
    varies as if it had two more of either extreme; one where fewer than five differ, one more of the largest difference
    and one of its opposite: percentiles of so few say less than they seem to. p: of a sign-flip test, two-sided, that
    no model is better: each problem's difference could as well have been the other way round.

    Raises:
        ValueError: the problems are not as many, and what `interval` raises.
    """
    if [len(one) for one in ours] != [len(one) for one in theirs]:
        raise ValueError("difference: needs two models' scores on the same problems")
    every = [a - b for a, b in zip(_checked("difference", ours), _checked("difference", theirs), strict=True)]
    mean = float(np.mean([scores.mean() for scores in every]))
    low, high = _percentiles([_with_extremes(scores) for scores in every], mean, confidence, seed)
    rng = np.random.default_rng(seed)
    flipped = np.zeros(RESAMPLES)
    for scores in every:
        for at, rows in _blocks(len(scores)):
            signs = rng.integers(0, 2, (rows, len(scores)), dtype=np.int8) * 2 - 1
            flipped[at : at + rows] += signs @ scores / len(scores) / len(every)
    as_far = int(np.count_nonzero(np.abs(flipped) >= abs(mean) - 1e-12))
    return mean, max(-1.0, low), min(1.0, high), (1 + as_far) / (1 + RESAMPLES)


def _checked(name: str, benchmarks: Sequence[Sequence[float]]) -> list[NDArray[np.float64]]:
    every = [np.asarray(scores, dtype=np.float64) for scores in benchmarks]
    if not every or not all(len(scores) and np.isfinite(scores).all() for scores in every):
        raise ValueError(f"{name}: needs at least a benchmark, with a problem in each, and numbers for scores")
    return every


def _with_extremes(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    if np.ptp(scores) == 0:
        return np.append(scores, (-1, -1, 1, 1))
    largest = np.abs(scores).max()
    return np.append(scores, (-largest, largest)) if np.count_nonzero(scores) < FEW else scores


def wilson(successes: float, trials: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, n = successes / trials, trials
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * ((p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5)
    return max(0.0, centre - half), min(1.0, centre + half)


def _percentiles(varied: list[NDArray[np.float64]], mean: float, confidence: float, seed: int) -> tuple[float, float]:
    """Widened, see `interval`; as they lie about the mean of the resampled, laid about `mean`."""
    fewest = min(len(scores) for scores in varied)
    tail = NormalDist().cdf(-math.sqrt(fewest / (fewest - 1)) * _t(0.5 + confidence / 2, fewest - 1))
    about = mean - float(np.mean([scores.mean() for scores in varied]))
    low, high = np.quantile(_means(varied, seed), (tail, 1 - tail)) + about
    return float(low), float(high)


def _effective(varied: list[NDArray[np.float64]], mean: float, confidence: float) -> tuple[float, float]:
    """Wilson's interval of the mean, of as many answers right or wrong as would vary so much; by Student's t."""
    if not 0 < mean < 1:
        return mean, mean
    fewest = min(len(scores) for scores in varied)
    variance = sum(float(scores.var(ddof=1)) / len(scores) for scores in varied) / len(varied) ** 2
    wider = NormalDist().inv_cdf(0.5 + confidence / 2) / _t(0.5 + confidence / 2, fewest - 1)
    trials = mean * (1 - mean) / variance * wider**2
    return wilson(mean * trials, trials, confidence)


def _means(benchmarks: list[NDArray[np.float64]], seed: int) -> NDArray[np.float64]:
    """[R] unweighted means over benchmarks of problems drawn with replacement."""
    rng = np.random.default_rng(seed)
    means = np.zeros(RESAMPLES)
    for scores in benchmarks:
        for at, rows in _blocks(len(scores)):
            drawn = rng.integers(0, len(scores), (rows, len(scores)), dtype=np.int32)
            means[at : at + rows] += scores[drawn].mean(axis=1) / len(benchmarks)
    return means


def _blocks(problems: int) -> list[tuple[int, int]]:
    """(begin, size) of parts of the resamples."""
    size = max(1, BLOCK // problems)
    return [(at, min(size, RESAMPLES - at)) for at in range(0, RESAMPLES, size)]


def _t(probability: float, freedom: int) -> float:
    """Quantile of Student's t: closed forms of 1 and 2 degrees of freedom, beyond by Abramowitz and Stegun 26.7.5."""
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        return (2 * probability - 1) * math.sqrt(2 / (4 * probability * (1 - probability)))
    z, v = NormalDist().inv_cdf(probability), freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3
