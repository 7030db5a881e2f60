"""Which examples make up each batch: a pure function of (seed, epoch, position).

Every epoch is a new permutation without replacement; its last partial batch is dropped. Deliberately absent: workers,
prefetching, sharding.
"""

import random
from typing import Any


class Batches:
    """An endless sequence of index batches that resumes exactly.

    n: number of examples. batch_size: indices a batch. Raises ValueError when a batch is larger than the data.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"Batches: batch_size must be at least 1, got {batch_size}")
        if n < batch_size:
            raise ValueError(f"Batches: batch_size must be at most the number of examples ({n}), got {batch_size}")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.epoch, self.cursor = 0, 0
        self._order: tuple[int, list[int]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Number of whole batches in an epoch."""
        return self.n // self.batch_size

    def batch(self, epoch: int, position: int) -> list[int]:
        """Batch `position` of `epoch`, both counted from 0; changes nothing that a caller can see."""
        if not 0 <= position < self.batches_per_epoch:
            raise ValueError(f"Batches: position must be in [0, {self.batches_per_epoch}), got {position}")
        if self._order is None or self._order[0] != epoch:
            rng = random.Random(f"luffy batches {self.seed} {epoch}")
            # Sorting by random keys, because only random() is promised to stay the same across Python versions.
            keys = [rng.random() for _ in range(self.n)]
            self._order = epoch, sorted(range(self.n), key=keys.__getitem__)
        start = position * self.batch_size
        return self._order[1][start : start + self.batch_size]

    def next(self) -> list[int]:
        """The next batch's indices; starts the next epoch when this one has no whole batch left."""
        if self.cursor >= self.batches_per_epoch:
            self.epoch, self.cursor = self.epoch + 1, 0
        indices = self.batch(self.epoch, self.cursor)
        self.cursor += 1
        return indices

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to continue with the same batches."""
        names = ("n", "batch_size", "seed", "epoch", "cursor")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ValueError when the data, batch size or seed is another."""
        for name in ("n", "batch_size", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"Batches: {name} must be {state[name]} as in the saved state, got {getattr(self, name)}"
                )
        self.epoch, self.cursor = int(state["epoch"]), int(state["cursor"])
