"""Group-relative advantages."""

from statistics import fmean, stdev

EPS = 1e-6


def group_advantages(rewards: list[float], divide_by_std: bool = False) -> list[float]:
    """reward - mean over the group, traces included; divided by (std + 1e-6) for the original GRPO.

    Dr.GRPO (arXiv 2503.20783) and LUFFY leave the std out. A group whose rewards are all equal gets exact zeros.
    """
    if not rewards:
        return []
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    scale = stdev(rewards) + EPS if divide_by_std else 1.0
    return [(reward - mean) / scale for reward in rewards]
