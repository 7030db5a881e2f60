"""What the networks beside the policy say of a step's rows, before the objective assigns anything; and what those learn
that learn first."""

from luffy.groups import Group
from luffy.networks.base import Network
from luffy.setup import Trainer
from luffy.share import said_of, share_of


def judge(t: Trainer, groups: list[Group], updates: int) -> dict[str, float]:
    """Fill `said` of the rows that the objective wants judged, one network after the other, a pass without a backward
    each. Collective; every rank holds the same groups, and afterwards knows the same of them.

    Args:
        updates: of the policy so far, for learning rates.

    Returns:
        Metrics of the networks that learn from these rows before they are asked.
    """
    metrics: dict[str, float] = {}
    for network in t.networks:
        if network.learns_first:
            metrics |= learn_first(t, network, groups, updates)
        judged = [row for group in groups for row in t.objective.judged(group)]
        for row, values in zip(judged, said_of(t, groups, t.objective.judged, network.says), strict=True):
            row.said[network.name] = values
        network.rest()
    return metrics


def learn_first(t: Trainer, network: Network, groups: list[Group], updates: int) -> dict[str, float]:
    """In as many updates as the policy will make of the step; the metrics are the last one's."""
    metrics: dict[str, float] = {}
    train = t.config.train
    share = len(groups) // train.updates_per_step
    for at in range(0, len(groups), share):
        if micros := share_of(t, groups[at : at + share], t.objective.judged):
            metrics = network.learn(micros, updates, train.steps * train.updates_per_step)
            updates += 1
    return metrics
