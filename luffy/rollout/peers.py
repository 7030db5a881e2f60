"""Ranks that hold a model together (tensor parallelism in the trainer's processes): each asks for its own prompts, and
all of them step through everybody's, in the same order, as vLLM's external launcher wants it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from luffy.rollout.engine import Completion, Generation, Request


class Peers:
    """Each `size` consecutive ranks. Collective over all ranks."""

    def __init__(self, size: int) -> None:
        self._group, _ = dist.new_subgroups(size)
        self._size = size

    def share(self, requests: Sequence[Request], answered: Callable[[list[Request]], Generation]) -> "Share":
        """Collective over the peers."""
        parts: list[Any] = [None] * self._size
        dist.all_gather_object(parts, list(requests), group=self._group)
        mine = dist.get_rank(self._group)
        first = sum(map(len, parts[:mine]))
        return Share(answered([request for part in parts for request in part]), first, first + len(requests))


class Share:
    """One peer's part of a generation. Peers step alike: it goes on until all of it is answered, and none stops it."""

    def __init__(self, generation: Generation, first: int, last: int) -> None:
        self._generation, self._first, self._last = generation, first, last
        self._found: dict[int, list[Completion]] = {}

    @property
    def waiting(self) -> int:
        return self._generation.waiting

    def take(self, timeout: float) -> list[tuple[int, list[Completion]]]:
        while self._generation.waiting:
            self._found.update(self._generation.take(float("inf")))
        return [(index - self._first, self._found[index]) for index in range(self._first, self._last)]

    def stop(self) -> dict[int, list[Completion]]:
        return {}
