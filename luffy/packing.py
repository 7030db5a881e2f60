"""Rows -> token-budget micro-batches without padding.

The unit is a group's prompt with some of its rows (the prompt enters the body once, see `luffy.attention`). Units are
placed first-fit, largest first; a group larger than the budget is split, its prompt repeated. The head sees response
tokens only: `source[n]` is the packed position whose hidden state predicts `targets[n]` - for the first token of every
row that is the last token of the shared prompt. The last token of a row predicts nothing and stays out of the body.

    T packed tokens, N response tokens
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from luffy.attention import Layout, Segment
from luffy.groups import Group, Row


@dataclass(slots=True, kw_only=True)
class MicroBatch:
    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, as if each row stood alone behind its prompt
    layout: Layout
    source: Tensor  # [N] int64, index into T
    targets: Tensor  # [N] int64
    advantages: Tensor  # [N] float32
    loss_id: Tensor  # [N] int64
    is_trace: Tensor  # [N] bool
    sampler_logp: Tensor  # [N] float32, NaN where nobody sampled
    old_logp: Tensor | None = None  # [N] float32; None: this pass's own

    @property
    def num_tokens(self) -> int:
        return self.token_ids.numel()

    @property
    def num_targets(self) -> int:
        return self.targets.numel()

    def to(self, device: torch.device) -> "MicroBatch":
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self


@dataclass(slots=True)
class _Unit:
    prompt_ids: tuple[int, ...]
    rows: list[Row]

    @property
    def cost(self) -> int:
        return len(self.prompt_ids) + sum(len(row.token_ids) - 1 for row in self.rows)


def pack(groups: list[Group], rows_of, budget: int) -> list[MicroBatch]:
    """Micro-batches of at most `budget` tokens holding `rows_of(group)` of every group.

    A row that exceeds the budget by itself becomes a micro-batch of its own. Deterministic.
    """
    units = [unit for group in groups for unit in _split(group.example.prompt_ids, rows_of(group), budget)]
    bins: list[list[_Unit]] = []
    room: list[int] = []
    for unit in sorted(units, key=lambda unit: -unit.cost):
        index = next((i for i, free in enumerate(room) if free >= unit.cost), None)
        if index is None:
            bins.append([])
            room.append(budget)
            index = len(bins) - 1
        bins[index].append(unit)
        room[index] -= unit.cost
    return [_assemble(units) for units in bins]


def _split(prompt_ids: tuple[int, ...], rows: list[Row], budget: int) -> list[_Unit]:
    units: list[_Unit] = []
    for row in rows:
        if not units or units[-1].cost + len(row.token_ids) > budget:
            units.append(_Unit(prompt_ids, []))
        units[-1].rows.append(row)
    return units


def _assemble(units: list[_Unit]) -> MicroBatch:
    token_ids: list[int] = []
    positions: list[int] = []
    source: list[int] = []
    rows: list[Row] = []
    segments: list[Segment] = []
    for unit in units:
        start, length = len(token_ids), len(unit.prompt_ids)
        token_ids += unit.prompt_ids
        positions += range(length)
        segment = Segment(start, len(token_ids), [])
        for row in unit.rows:
            begin, inputs = len(token_ids), row.token_ids[:-1]
            token_ids += inputs
            positions += range(length, length + len(inputs))
            source += [start + length - 1, *range(begin, begin + len(inputs))]
            if inputs:
                segment.rows.append((begin, begin + len(inputs)))
            rows.append(row)
        segments.append(segment)
    sizes = torch.tensor([len(row.token_ids) for row in rows])
    nan = float("nan")
    return MicroBatch(
        token_ids=torch.tensor(token_ids),
        positions=torch.tensor(positions),
        layout=Layout(segments, len(token_ids)),
        source=torch.tensor(source),
        targets=torch.tensor([token for row in rows for token in row.token_ids]),
        advantages=torch.tensor([row.advantage for row in rows], dtype=torch.float32).repeat_interleave(sizes),
        loss_id=torch.tensor([row.loss_id for row in rows]).repeat_interleave(sizes),
        is_trace=torch.tensor([row.is_trace for row in rows]).repeat_interleave(sizes),
        sampler_logp=torch.tensor([x for row in rows for x in (row.sampler_logp or [nan] * len(row.token_ids))]),
    )
