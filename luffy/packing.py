"""Rows -> token-budget micro-batches without padding, shared evenly by the ranks (`luffy.balance` says who gets what).

A unit is a group's prompt with some of its rows; the prompt enters the body once (see `luffy.attention`). The head sees
response tokens only: `source[n]` is the packed position whose hidden state predicts `targets[n]` - for the first token
of every row that is the last token of the shared prompt. The last token of a row predicts nothing and stays out of the
body. A prefix that nothing is learned of is in the body alone.

    T packed tokens, N response tokens, R rows
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luffy.attention import Layout, Segment
from luffy.balance import Bin, plan
from luffy.groups import Group, Row


@dataclass(slots=True, kw_only=True)
class MicroBatch:
    """One forward and backward pass of a rank: a packed stream, and of each target in it what its loss is made of."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, as if each row stood alone behind its prompt
    layout: Layout
    source: Tensor  # [N] int64, index into T
    targets: Tensor  # [N] int64
    advantages: Tensor  # [N] float32
    loss_id: Tensor  # [N] int64
    is_trace: Tensor  # [N] bool
    token_weight: Tensor  # [N] float32
    sampler_logp: Tensor  # [N] float32, NaN where nobody sampled
    old_logp: Tensor | None = None  # [N] float32; None: this pass's own
    behaviour: Tensor | None = None  # [N] float32, NaN where a row does not say who wrote it; None: nowhere
    ref_logp: Tensor | None = None  # [N] float32, of the reference policy; None: nobody asked it
    returns: Tensor | None = None  # [N] float32, what a network beside the policy learns; None: nothing
    row: Tensor | None = None  # [N] int64, which of the micro-batch's rows; None: not made by `pack`
    rewards: Tensor | None = None  # [R] float32, of the micro-batch's rows, also where ranks share its tokens
    num_rows: int = 0  # R

    @property
    def num_tokens(self) -> int:
        return self.token_ids.numel()

    @property
    def num_targets(self) -> int:
        return self.targets.numel()

    @property
    def compared_logp(self) -> Tensor | None:
        """[N] what the loss compares a token's log-prob with: that of who wrote it, where a row says so, else that of
        the policy before the step; None: the policy's own."""
        if self.behaviour is None:
            return self.old_logp
        assert self.old_logp is not None, "the pass at the beginning of the step comes first"
        return torch.where(self.behaviour.isnan(), self.old_logp, self.behaviour)

    def to(self, device: torch.device) -> "MicroBatch":
        """Move its tensors, in place."""
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self


def pack(
    groups: list[Group],
    rows_of: Callable[[Group], list[Row]],
    budget: int,
    *,
    rank: int = 0,
    ranks: int = 1,
    attention_weight: float = 0.0,
) -> list[MicroBatch]:
    """This rank's micro-batches of at most `budget` tokens; all ranks' together hold `rows_of(group)` of every group.

    Every rank passes the same groups and gets equally many micro-batches without a word to the others: the result is
    a function of the arguments. Where a rank has nothing to do in a slot it gets one token (id 0) without targets. A
    row that exceeds the budget by itself becomes a micro-batch of its own. No rows at all: no micro-batches.

    Args:
        budget: tokens of a micro-batch, prompts and rows without their last tokens.
        attention_weight: cost of one attended pair in units of one token's other work; 0 balances tokens. See
            `luffy.flops.attention_weight`.

    Raises:
        ValueError: rank is not one of ranks, budget is not positive, or a row has no tokens.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"pack: rank must be one of {ranks} ranks, counted from 0, got {rank}")
    return [assemble(slot[rank]) for slot in plan(groups, rows_of, budget, ranks, attention_weight)]


def assemble(units: Bin) -> MicroBatch:
    """One micro-batch; its rows are those of the units, in their order."""
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
            source += [start + length - 1, *range(begin, begin + len(inputs))][row.unlearned :]
            if inputs:
                segment.rows.append((begin, begin + len(inputs)))
            rows.append(row)
        segments.append(segment)
    if not units:  # one token that nothing is learned from: this rank's part in the others' collectives
        token_ids, positions, segments = [0], [0], [Segment(0, 1, [])]
    nan = float("nan")
    # a row's prefix and the rest of it differ in what is learned
    prefixes = [row.prefix - row.unlearned for row in rows]
    sizes = torch.tensor([n for row, p in zip(rows, prefixes, strict=True) for n in (p, row.num_targets - p)])

    def per_part(values: list[tuple[Any, Any]], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).flatten().repeat_interleave(sizes.long())

    def per_row(values: list, dtype: torch.dtype) -> Tensor:
        return per_part([(value, value) for value in values], dtype)

    def known(logps: list[tuple[float, ...]]) -> Tensor:
        all_of = [found or [nan] * len(row.token_ids) for row, found in zip(rows, logps, strict=True)]
        values = [x for row, found in zip(rows, all_of, strict=True) for x in found[row.unlearned :]]
        return torch.tensor(values, dtype=torch.float32)

    def joined(parts: list[tuple[Tensor | None, Row]]) -> Tensor | None:
        known = [part[row.unlearned :] for part, row in parts if part is not None]
        return torch.cat([torch.empty(0), *known]) if len(known) == len(parts) else None

    advantages = joined([(row.advantages, row) for row in rows])

    return MicroBatch(
        token_ids=torch.tensor(token_ids),
        positions=torch.tensor(positions),
        layout=Layout(segments, len(token_ids)),
        source=torch.tensor(source, dtype=torch.int64),
        targets=torch.tensor([token for row in rows for token in row.token_ids[row.unlearned :]], dtype=torch.int64),
        advantages=per_row([row.advantage for row in rows], torch.float32) if advantages is None else advantages,
        loss_id=per_part([(row.prefix_loss, row.loss_id) for row in rows], torch.int64),
        is_trace=per_part([(True, row.is_trace) for row in rows], torch.bool),
        token_weight=per_part([(row.weight * row.prefix_weight, row.weight) for row in rows], torch.float32),
        sampler_logp=known([row.sampler_logp for row in rows]),
        behaviour=known([row.behaviour for row in rows]) if any(row.behaviour for row in rows) else None,
        ref_logp=joined([(row.said.get("reference"), row) for row in rows]),
        returns=joined([(row.returns, row) for row in rows]),
        row=per_row(list(range(len(rows))), torch.int64),
        rewards=torch.tensor([row.reward for row in rows], dtype=torch.float32),
        num_rows=len(rows),
    )
