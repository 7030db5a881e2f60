"""What the policy says of single tokens: a few groups, kept at every evaluation, for the report's token view.

    watched   groups of the first step. Every evaluation scores their tokens again, from before the first update on:
              what was learned of the same answers
    fresh     groups of the step before an evaluation, with the rollouts of that time; scored once

`tokens/step-000010.parquet` is of the weights after ten steps, a line a row of a group. A token's numbers are what an
update of that moment would begin with on its group, as if it had just been sampled: the objective assigns advantages
and losses anew, since they may depend on how far the run is. The slope of a token's loss in its log-prob is that of the
policy loss, weights included; entropy bonus and KL term are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
"""Of a row that is shown; those of watched rows are all kept, to be scored again."""
MOST_TEXT = 2000
"""Characters of a question."""
LONGEST_CHARACTER = 4
"""Bytes in UTF-8."""


class TokenRecords:
    """The groups that are kept, and where.

    Opening it to go on from step n forgets what followed step n, as `luffy.metrics.MetricsLog` does.

    Args:
        folder: of the run's records.
        count: groups watched, and fresh ones of an evaluation; 0: nothing is kept.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.watched: list[Group] = []
        self._latest: list[Group] = []
        self._sampled = self._written = -1

    def resume(self, t: Trainer, step: int) -> None:
        """Go on after `step`: later files go, watched groups are those of the first file. Collective.

        Raises:
            UserError: the folder cannot be written, or the first file is damaged.
        """
        groups, written = [], -1
        if t.world.is_main:
            with disk_errors("tokens"):
                for path in self.folder.glob("step-*.parquet"):
                    if step_of(path) > (step or -1):  # one of another name is not ours
                        path.unlink()
            written = max(map(step_of, self.folder.glob("step-*.parquet")), default=-1)
            first = self.folder / name_of(0)
            groups = read_groups(first, t) if self.count and first.is_file() else []
        self.watched, self._written = t.world.everyone((groups, written))[0]

    def see(self, t: Trainer, step: int, groups: list[Group]) -> None:
        """A step's groups, graded and judged, before the objective assigns anything; the first step's are scored.
        Collective."""
        if not self.count:
            return
        self._latest, self._sampled = [untouched(group) for group in telling(groups, self.count)], step
        if step == 1:
            self.watched = self._latest
            self._write(t, 0, [])

    def write(self, t: Trainer, step: int) -> None:
        """Score the watched groups, and fresh ones, by the weights after `step`. Collective."""
        if self.count and step != self._written:
            self._write(t, step, self._latest if self._sampled > 1 else [])

    def _write(self, t: Trainer, step: int, fresh: list[Group]) -> None:
        groups = [*self.watched, *fresh]
        self._written = step
        if not groups:
            return
        scored = score(t, groups, step / t.config.train.steps)
        if not t.world.is_main:
            return
        lines = []
        for number, (group, rows) in enumerate(zip(groups, scored, strict=True)):
            watched = number < len(self.watched)
            place = {"group": number, "watched": watched, "sampled": 1 if watched else self._sampled}
            lines += [
                place | stored(t, group, row, said, whole=step == 0) for row, said in zip(group.rows, rows, strict=True)
            ]
        with disk_errors("tokens"):
            self.folder.mkdir(exist_ok=True)
        write(self.folder / name_of(step), lines)


def score(t: Trainer, groups: list[Group], progress: float) -> list[list[Tensor]]:
    """[n, len(NUMBERS)] of every row of every group, by the policy as it is; NaN where no loss sees a token.

    The objective assigns copies of the rows. One that it leaves out has slope 0; what it learns of a copy of a row is
    added to the row's. Collective.
    """
    copies = [untouched(group) for group in groups]
    terms = t.objective.terms(copies, progress)
    rows = {id(group): list(group.rows) for group in copies}  # every row's log-probs, learned of or not
    for group, learned in zip(copies, terms.rows, strict=True):
        rows[id(group)] += [row for row in learned if not any(row is one for one in group.rows)]
    said = iter(said_of(t, copies, lambda group: rows[id(group)], lambda micro: numbers(t, micro)))
    found = []
    for group, learned in zip(copies, terms.rows, strict=True):
        values = [(row, padded(row, next(said))) for row in rows[id(group)]]
        own, copied = values[: len(group.rows)], values[len(group.rows) :]
        for row, value in own:
            value[:, -1] *= any(row is one for one in learned)
            for other, more in copied:
                if (other.token_ids, other.is_trace) == (row.token_ids, row.is_trace):
                    value[:, -1] += more[:, -1]
        found.append([value for _, value in own])
    return found


def padded(row: Row, said: Tensor) -> Tensor:
    """[n, ...] of all tokens of a row, NaN where no loss sees them."""
    known = torch.full((len(row.token_ids), *said.shape[1:]), torch.nan)
    known[row.unlearned :] = said
    return known


def stored(t: Trainer, group: Group, row: Row, said: Tensor, whole: bool) -> dict[str, Any]:
    """What is stored of a row; whole: with what scoring it again needs."""
    ids, answer = row.token_ids[:MOST_TOKENS], group.example.problem.answer
    known = {
        "example": group.index,
        "id": group.example.problem.id,
        "question": group.example.problem.messages[-1]["content"][:MOST_TEXT],
        "answer": answer if isinstance(answer, str) else ", ".join(answer),
        "is_trace": row.is_trace,
        "teacher": row.teacher,
        "reward": float(row.reward),
        "verdict": row.verdict,
        "finished": row.finished,
        "prefix": row.prefix,
        "length": len(row.token_ids),
        "tokens": pieces(t.template.tokenizer, ids),
        "sampler_logp": list(row.sampler_logp if whole else row.sampler_logp[:MOST_TOKENS]),
        "behaviour": list(row.behaviour if whole else row.behaviour[:MOST_TOKENS]),
        "token_ids": list(row.token_ids if whole else ids),
        **{name: column.tolist() for name, column in zip(NUMBERS, said[: len(ids)].T, strict=True)},
    }
    return known | {f"said/{name}": values.tolist() for name, values in row.said.items() if whole}


def untouched(group: Group) -> Group:
    """With copies of its rows, which an objective may write on."""
    return replace(group, rows=[replace(row, said=dict(row.said)) for row in group.rows])


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token within the text of all; where several make up one character the last of them has it."""
    [before, *_] = tokenizer.encode("a", add_special_tokens=False)  # alone, some tokens lose the space they begin with

    def text(more: Sequence[int]) -> str:
        return str(tokenizer.decode([before, *more], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    lead, found, begin = text([]), [], 0
    for end in range(1, len(ids) + 1):
        piece = text(ids[begin:end]).removeprefix(lead)
        whole = not piece.endswith("\ufffd") or end - begin == LONGEST_CHARACTER
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


def read_groups(path: Path, t: Trainer) -> list[Group]:
    """The watched groups of a run's first file, as they were before the objective assigned anything; without those
    whose problem is no longer where it was in the data."""
    found: dict[int, Group] = {}
    for kept in read(path):
        at = kept["example"]
        if not 0 <= at < len(t.examples) or t.examples[at].problem.id != kept["id"]:
            continue
        group = found.setdefault(kept["group"], Group(example=t.examples[at], index=at))
        ids = tuple(kept["token_ids"])
        said = {key.removeprefix("said/"): torch.tensor(kept[key]) for key in kept if key.startswith("said/")}
        row = Row(
            token_ids=ids,
            text=t.template.decode(ids),
            is_trace=kept["is_trace"],
            teacher=kept["teacher"],
            finished=kept["finished"],
            sampler_logp=tuple(kept["sampler_logp"]),
            behaviour=tuple(kept["behaviour"]),
            reward=kept["reward"],
            verdict=kept["verdict"],
            prefix=kept["prefix"],
            said=said,
        )
        group.rows.append(row)
    return list(found.values())
