"""What the policy says of single tokens: a few groups, kept at every evaluation, for the report's token view.

    watched   groups of the first step. Every evaluation scores their tokens again, from before the first update on:
              what was learned of the same answers
    fresh     groups of the step before an evaluation, with the rollouts of that time; scored once

`tokens/step-000010.parquet` is of the weights after ten steps, a line a row of a group. A token's numbers are what an
update on its group would begin with then: its advantage, and the slope of its loss in its log-prob, weights included.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from luffy_kernels.token_losses import encode, evaluate
from torch import Tensor

from luffy.correction import correct
from luffy.files import disk_errors
from luffy.groups import Group, Row
from luffy.objectives.looking import Seen
from luffy.packing import MicroBatch
from luffy.share import said_of
from luffy.token_file import NUMBERS, name_of, read, step_of, write

if TYPE_CHECKING:
    from luffy.setup import Trainer

MOST_TOKENS = 2048
"""Of a row; what follows is counted and not kept."""
MOST_TEXT = 2000
"""Characters of a question."""
MOST_BYTES = 4
"""Of a character in UTF-8."""


class TokenRecords:
    """The groups that are kept, and where.

    Opening it to go on from step n forgets what followed step n, as `luffy.metrics.MetricsLog` does.

    Args:
        folder: of the run's records.
        count: groups watched, and fresh ones of an evaluation; 0: nothing is kept.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.watched: list[tuple[int, Group]] = []
        """(step that sampled it, group)"""
        self._latest: list[Group] = []
        self._step = 0
        self._written = -1

    def resume(self, t: Trainer, step: int) -> None:
        """Go on after `step`: later files go, watched groups are those of the first file. Collective."""
        if t.world.is_main:
            with disk_errors("tokens"):
                for path in self.folder.glob("step-*.parquet"):
                    if step == 0 or step_of(path) > step:
                        path.unlink()
        first = self.folder / name_of(0)
        found = read_groups(first, t) if t.world.is_main and self.count and first.is_file() else []
        self.watched = t.world.everyone(found)[0]

    def see(self, t: Trainer, step: int, groups: list[Group]) -> None:
        """A step's groups, their advantages known, before its update; the first step's are scored. Collective."""
        self._latest, self._step = groups, step
        if step == 1 and self.count:
            self.watched = [(1, group) for group in telling(groups, self.count)]
            self._write(t, 0, [])

    def write(self, t: Trainer, step: int) -> None:
        """Score the watched groups, and fresh ones, by the weights after `step`. Collective."""
        if self.count and step != self._written:
            fresh = [] if self._step in (0, 1) else telling(self._latest, self.count)
            self._write(t, step, [(self._step, group) for group in fresh])

    def _write(self, t: Trainer, step: int, fresh: list[tuple[int, Group]]) -> None:
        groups = [*self.watched, *fresh]
        if not groups:
            return
        said = said_of(t, [group for _, group in groups], lambda group: group.rows, lambda micro: numbers(t, micro))
        self._written = step
        if not t.world.is_main:
            return
        lines, rest = [], iter(said)
        for number, (sampled, group) in enumerate(groups):
            for row in group.rows:
                line = self._line(t, group, row, next(rest))
                lines.append({"group": number, "watched": number < len(self.watched), "sampled": sampled} | line)
        with disk_errors("tokens"):
            self.folder.mkdir(exist_ok=True)
        write(self.folder / name_of(step), lines)

    def _line(self, t: Trainer, group: Group, row: Row, said: Tensor) -> dict[str, Any]:
        ids = row.token_ids[:MOST_TOKENS]
        known = torch.full((len(row.token_ids), len(NUMBERS)), torch.nan)
        known[row.unlearned :] = said
        of_tokens = {name: column.tolist() for name, column in zip(NUMBERS, known[: len(ids)].T, strict=True)}
        return {
            "example": group.index,
            "id": group.example.problem.id,
            "question": group.example.problem.messages[-1]["content"][:MOST_TEXT],
            "answer": group.example.problem.answer,
            "is_trace": row.is_trace,
            "teacher": row.teacher,
            "reward": row.reward,
            "finished": row.finished,
            "prefix": row.prefix,
            "prefix_loss": row.prefix_loss,
            "prefix_weight": row.prefix_weight,
            "loss_id": row.loss_id,
            "weight": row.weight,
            "row_advantage": row.advantage,
            "row_advantages": [] if row.advantages is None else row.advantages[:MOST_TOKENS].tolist(),
            "length": len(row.token_ids),
            "token_ids": ids,
            "tokens": pieces(t.template.tokenizer, ids),
            "sampler_logp": row.sampler_logp[:MOST_TOKENS],
            "behaviour": row.behaviour[:MOST_TOKENS],
            **of_tokens,
        }


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token within the text of all; where several make up one character the last of them has it."""
    [before, *_] = tokenizer.encode("a", add_special_tokens=False)  # alone, some tokens lose the space they begin with

    def text(more: Sequence[int]) -> str:
        return str(tokenizer.decode([before, *more], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    lead, found, begin = text([]), [], 0
    for end in range(1, len(ids) + 1):
        piece = text(ids[begin:end]).removeprefix(lead)
        whole = not piece.endswith("\ufffd") or end - begin == MOST_BYTES
        found.append(piece if whole else "")
        begin = end if whole else begin
    return found


def numbers(t: Trainer, micro: MicroBatch) -> Tensor:
    """[N, len(NUMBERS)] of a micro-batch's targets by the policy as it is, in this rank's part of them; slope is
    d loss / d logp times the token's weight, before the division by the update's normaliser."""
    micro.old_logp, entropy = t.policy(micro, entropy=True)
    correct(micro, t.config.correction)
    if t.objective.looks != "nothing":
        t.objective.weigh(micro, Seen(micro.old_logp, entropy))
    rows = encode(t.objective.losses).to(micro.old_logp.device)[micro.loss_id]
    slope = evaluate(micro.old_logp, micro.advantages, micro.compared_logp, rows).grad * micro.token_weight
    return torch.stack([micro.old_logp, entropy, micro.advantages, slope], dim=1)


def telling(groups: Sequence[Group], count: int) -> list[Group]:
    """Those of which most can be seen: with a trace, and with answers of different rewards; else the first ones."""

    def dullness(group: Group) -> tuple[bool, bool]:
        return not group.traces, len({row.reward for row in group.rows}) < 2

    return sorted((group for group in groups if group.rows), key=dullness)[:count]


def read_groups(path: Path, t: Trainer) -> list[tuple[int, Group]]:
    """The watched groups of a file, with what scoring them again needs. A row that was too long to be kept whole is
    what was kept of it."""
    found: dict[int, tuple[int, Group]] = {}
    for line in read(path):
        if not line["watched"]:
            continue
        example = t.examples[line["example"]]
        _, group = found.setdefault(line["group"], (line["sampled"], Group(example=example, index=line["example"])))
        ids = tuple(line["token_ids"])
        row = Row(
            token_ids=ids,
            text=t.template.decode(ids),
            is_trace=line["is_trace"],
            teacher=line["teacher"],
            finished=line["finished"],
            sampler_logp=tuple(line["sampler_logp"]),
            behaviour=tuple(line["behaviour"]),
            reward=line["reward"],
            advantage=line["row_advantage"],
            advantages=torch.tensor(line["row_advantages"]) if line["row_advantages"] else None,
            loss_id=line["loss_id"],
            weight=line["weight"],
            prefix=line["prefix"],
            prefix_loss=line["prefix_loss"],
            prefix_weight=line["prefix_weight"],
        )  # fmt: skip
        group.rows.append(row)
    return list(found.values())
