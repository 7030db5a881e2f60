"""What the networks beside the policy say of a step's rows, before the objective assigns anything; and what those learn
that learn first."""

import torch
import torch.distributed as dist
from torch import Tensor

from luffy.balance import plan
from luffy.groups import Group
from luffy.networks.base import Network
from luffy.packing import MicroBatch, assemble
from luffy.sequence import holds, slice_of
from luffy.setup import Trainer
from luffy.share import share_of


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
        numbered = dict(enumerate(row for group in groups for row in t.objective.judged(group)))
        for said in t.world.everyone(said_of(t, network, groups)):
            for number, values in said:
                numbered[number].said[network.name] = values
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


@torch.no_grad()
def said_of(t: Trainer, network: Network, groups: list[Group]) -> list[tuple[int, Tensor]]:
    """(number of a row that is judged, [n] float32 on the CPU) of this rank's share of the rows."""
    numbers = {id(row): n for n, row in enumerate(row for group in groups for row in t.objective.judged(group))}
    budget = t.config.train.tokens_per_micro
    found: list[tuple[int, Tensor]] = []
    for slot in plan(groups, t.objective.judged, budget, t.world.data_ranks, t.policy.attention_weight):
        units = slot[t.world.data_rank]
        rows = [row for unit in units for row in unit.rows]
        values = whole(t, network, assemble(units)).cpu().split([len(row.token_ids) for row in rows])
        found += [(numbers[id(row)], part.clone()) for row, part in zip(rows, values, strict=True)]
    return found


def whole(t: Trainer, network: Network, micro: MicroBatch) -> Tensor:
    """[N] of all targets of a micro-batch, also where ranks share its tokens."""
    rank, group = t.world.sequence_rank, t.world.sequence_group
    said = network.says(slice_of(micro, rank, group).to(t.device)).float()
    if group is None:
        return said
    values = torch.zeros(micro.num_targets, device=said.device)
    values[holds(micro, rank, group.size()).to(said.device)] = said
    dist.all_reduce(values, group=group)
    return values
