"""Answers of earlier steps that join a step's groups, where the objective keeps some.

All ranks know the same candidates. Which answer of a question it is may depend on what the policy says of it now: a
pass of body and head over the candidates, which the ranks share like an update's rows.
"""

import torch

from luffy.balance import plan
from luffy.groups import Group, Row
from luffy.objectives.looking import row_sums
from luffy.packing import assemble
from luffy.sequence import slice_of
from luffy.setup import Trainer


def recall(t: Trainer, seed: int) -> list[tuple[int, Row]]:
    """(number of the example, its stored answer) of a step, the same on every rank. Collective."""
    found = t.objective.recall(t.config.train.prompts_per_step, seed)
    several = [(index, rows) for index, rows in found if len(rows) > 1]
    picked = {index: rows[0] for index, rows in found}
    if several:
        entropies = iter(total_entropies(t, [Group(example=t.examples[i], rows=rows, index=i) for i, rows in several]))
        for index, rows in several:
            picked[index] = t.objective.pick(rows, [next(entropies) for _ in rows])
    for row in picked.values():
        row.text = t.template.decode(row.token_ids)
    return list(picked.items())


@torch.no_grad()
def total_entropies(t: Trainer, groups: list[Group]) -> list[float]:
    """Of every row, group by group: the policy's entropy summed over its tokens, nats. Collective."""
    numbers = {id(row): n for n, row in enumerate(row for group in groups for row in group.rows)}
    mine: list[tuple[int, float]] = []
    slots = plan(
        groups,
        lambda group: group.rows,
        t.config.train.tokens_per_micro,
        t.world.data_ranks,
        t.policy.attention_weight,
    )
    for slot in slots:
        units = slot[t.world.data_rank]
        micro = slice_of(assemble(units), t.world.sequence_rank, t.world.sequence_group).to(t.device)
        _, entropy = t.policy(micro, entropy=True)
        rows = [row for unit in units for row in unit.rows]
        mine += zip([numbers[id(row)] for row in rows], row_sums(entropy, micro).tolist(), strict=True)
    found = dict(pair for pairs in t.world.everyone(mine) for pair in pairs)
    return [found[n] for n in range(len(numbers))]
