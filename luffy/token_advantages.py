"""Advantages that differ from token to token. n tokens of an answer."""

import torch
from torch import Tensor

from luffy.groups import Row

EPS = 1e-8  # of a variance


def gae(reward: float, values: Tensor, discount: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) of an answer that is rewarded at its last token.

    values: [n], V of the prefix before each token; behind the last one it is 0.

    Returns:
        ([n] advantages, [n] returns: advantages + values), float32. With discount = lam = 1 they are reward - values
        and the reward.
    """
    values = values.double()
    after = torch.cat([values[1:], values.new_zeros(1)])
    delta = discount * after - values
    delta[-1] += reward
    advantages = to_go(delta, discount * lam)
    return advantages.float(), (advantages + values).float()


def to_go(rewards: Tensor, discount: float = 1.0) -> Tensor:
    """[n] float64: of each token, the sum of its and all later rewards, each discounted by its distance."""
    if discount == 1.0:
        return rewards.double().flip(0).cumsum(0).flip(0)
    found, later = [], 0.0
    for reward in reversed(rewards.tolist()):
        later = reward + discount * later
        found.append(later)
    return torch.tensor(found[::-1], dtype=torch.float64)


def whiten(rows: list[Row]) -> None:
    """Shift and scale the advantages of these rows' tokens together to mean 0 and variance 1."""
    known = [row.advantages for row in rows if row.advantages is not None]
    if not known:
        return
    every = torch.cat(known).double()
    mean, scale = every.mean(), every.var(correction=0).clamp(min=EPS).rsqrt()
    for row in rows:
        if row.advantages is not None:
            give(row, (row.advantages.double() - mean) * scale)


def give(row: Row, advantages: Tensor) -> None:
    """advantages: [n], of a row's tokens; the row's own is their mean."""
    row.advantages, row.advantage = advantages.float(), advantages.double().mean().item()
