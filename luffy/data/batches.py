"""Which examples are trained on, in which order: a stream of positions without an end, and a ledger of those used up.

Position p is an example: a pure function of (seed, p). Every epoch is a new permutation without replacement, less its
last partial batch. Deliberately absent: workers, prefetching.
"""

import random
from collections.abc import Iterable, Iterator
from typing import Any


class Stream:
    """An endless sequence of example indices.

    n: number of examples. batch_size: positions a step. Raises ValueError when a batch is larger than the data.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"Stream: batch_size must be at least 1, got {batch_size}")
        if n < batch_size:
            raise ValueError(f"Stream: batch_size must be at most the number of examples ({n}), got {batch_size}")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._orders: dict[int, list[int]] = {}

    @property
    def per_epoch(self) -> int:
        """Positions of an epoch: whole batches."""
        return self.n - self.n % self.batch_size

    def index(self, position: int) -> int:
        """Of the example at `position`, from 0."""
        epoch, place = divmod(position, self.per_epoch)
        if epoch not in self._orders:
            rng = random.Random(f"luffy batches {self.seed} {epoch}")
            # Sorting by random keys, because only random() is promised to stay the same across Python versions.
            keys = [rng.random() for _ in range(self.n)]
            newest = list(self._orders.items())[-1:]  # prompts may be carried over the end of an epoch
            self._orders = dict(newest) | {epoch: sorted(range(self.n), key=keys.__getitem__)}
        return self._orders[epoch][place]


class Ledger:
    """Positions of a stream that are used up: trained on, or given up for want of a signal. Everything below `low` is,
    and what is in `beyond`. Ranks take positions each for itself; the ledger is what they agree on after a step, and
    what a checkpoint keeps, so that no prompt is lost or used twice, whatever was under way."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.low, self.beyond = stream, 0, set[int]()

    def use(self, positions: Iterable[int]) -> None:
        """Those below 0 are none of the stream's. Raises ValueError where one is used up already."""
        for position in positions:
            if position < 0:
                continue
            if position < self.low or position in self.beyond:
                raise ValueError(f"Ledger: position {position} is used twice")
            self.beyond.add(position)
        while self.low in self.beyond:
            self.beyond.remove(self.low)
            self.low += 1

    def unused(self, rank: int, ranks: int) -> Iterator[int]:
        """Positions that are this rank's to take, in order, as the ledger is now; without an end. A batch is dealt to
        the ranks in turn, so that each goes through the stream at the pace of its share."""
        position, beyond = self.low, set(self.beyond)
        while True:
            if (position % self.stream.batch_size) % ranks == rank and position not in beyond:
                yield position
            position += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on."""
        stream = {name: getattr(self.stream, name) for name in ("n", "batch_size", "seed")}
        return stream | {"low": self.low, "beyond": sorted(self.beyond)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ValueError when the data, batch size or seed is another."""
        for name in ("n", "batch_size", "seed"):
            if state[name] != getattr(self.stream, name):
                raise ValueError(
                    f"Ledger: {name} must be {state[name]} as in the saved state, got {getattr(self.stream, name)}"
                )
        self.low, self.beyond = int(state["low"]), set(map(int, state["beyond"]))
