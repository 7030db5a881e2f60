"""Right answers of earlier steps, by question, and which questions to answer again.

A question's bucket is how many of its newest rollouts were right, in units of `rows` of them, 1 to rows - 1. One whose
rollouts are all right is retired for good, with its answers. Every rank has the same: what comes in are the groups of
a whole step, and what is drawn depends on a seed alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luffy.groups import Group, Row

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Answer:
    """A right answer of n tokens, and what the engine thought of them."""

    token_ids: Tensor  # [n] int32
    logp: Tensor  # [n] float32, nats, under the weights that sampled it
    finished: bool

    def row(self) -> Row:
        """To join a group, compared with the weights that sampled it."""
        ids, logp = tuple(self.token_ids.tolist()), tuple(self.logp.tolist())
        return Row(token_ids=ids, text="", is_trace=True, finished=self.finished, behaviour=logp)


class Replay:
    """answers, bucket: of each question that has right answers, by its number in the training data."""

    def __init__(self, rows: int, *, kept: int | None = None, count_replays: bool = False) -> None:
        """kept: newest answers of a question that stay. count_replays: a replayed answer counts for the bucket."""
        self.rows, self.kept, self.count_replays = rows, kept, count_replays
        self.answers: dict[int, list[Answer]] = {}
        self.bucket: dict[int, int] = {}
        self.retired: set[int] = set()

    def add(self, group: Group) -> None:
        """What a graded group says of its question."""
        index, counted = group.index, [row for row in group.rows if self.count_replays or not row.is_trace]
        if index in self.retired or not counted:
            return
        right = sum(row.solved for row in counted)
        if right == len(counted):
            self.retired.add(index)
            self.answers.pop(index, None)
            self.bucket.pop(index, None)
            return
        for row in group.rows:
            if row.solved and not row.is_trace:
                self._store(index, row)
        if index in self.answers:
            self.bucket[index] = max(1, min(self.rows - 1, round(self.rows * right / len(counted))))

    def _store(self, index: int, row: Row) -> None:
        import torch

        mine = self.answers.setdefault(index, [])
        ids = torch.tensor(row.token_ids, dtype=torch.int32)
        if not any(torch.equal(ids, other.token_ids) for other in mine):
            mine.append(Answer(ids, torch.tensor(row.sampler_logp, dtype=torch.float32), row.finished))
            del mine[: -self.kept if self.kept else 0]

    def draw(self, count: int, seed: int, mean: float, std: float) -> list[int]:
        """At most `count` questions. Each time a bucket, by exp(-(k - mean)^2 / 2 std^2) over those that still have one
        whatever their sizes, then any of its questions."""
        rng = random.Random(seed)  # of which only random() is promised to stay the same across Python versions
        buckets: dict[int, list[int]] = {}
        for index in sorted(self.bucket):
            buckets.setdefault(self.bucket[index], []).append(index)
        found: list[int] = []
        while buckets and len(found) < count:
            keys = sorted(buckets)
            far = [((key - mean) / std) ** 2 / 2 for key in keys]
            weights = [math.exp(min(far) - each) for each in far]
            mine = buckets[key := _one_of(keys, weights, rng.random())]
            found.append(mine.pop(int(rng.random() * len(mine))))
            if not mine:
                del buckets[key]
        return found

    def state(self) -> dict[str, Tensor]:
        """retired: [questions] int64. buckets: [questions, 2] int64, (question, bucket). answers.question, .length and
        .finished: [answers]; .token_ids and .logp (nats): [tokens], those of all answers one after the other."""
        import torch

        stored = [(index, answer) for index, answers in self.answers.items() for answer in answers]
        ids = [answer.token_ids for _, answer in stored]
        return {
            "retired": torch.tensor(sorted(self.retired), dtype=torch.int64),
            "buckets": torch.tensor(list(self.bucket.items()), dtype=torch.int64).reshape(-1, 2),
            "answers.question": torch.tensor([index for index, _ in stored], dtype=torch.int64),
            "answers.length": torch.tensor([len(each) for each in ids], dtype=torch.int64),
            "answers.finished": torch.tensor([answer.finished for _, answer in stored], dtype=torch.bool),
            "answers.token_ids": torch.cat([torch.empty(0, dtype=torch.int32), *ids]),
            "answers.logp": torch.cat([torch.empty(0), *(answer.logp for _, answer in stored)]),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """state: as `state`."""
        self.retired = set(state["retired"].tolist())
        self.bucket = dict(state["buckets"].tolist())
        self.answers = {}
        lengths = state["answers.length"].tolist()
        parts = (state[f"answers.{name}"].split(lengths) for name in ("token_ids", "logp"))
        of = state["answers.question"].tolist(), state["answers.finished"].tolist()
        for index, finished, ids, logp in zip(*of, *parts, strict=True):
            self.answers.setdefault(index, []).append(Answer(ids, logp, finished))


def _one_of(keys: Sequence[int], weights: Sequence[float], at: float) -> int:
    """The key that a draw `at` from [0, 1) falls on."""
    left = at * sum(weights)
    for key, weight in zip(keys, weights, strict=True):
        if (left := left - weight) < 0:
            return key
    return keys[-1]
