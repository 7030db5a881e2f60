"""The ranks of a run: which part of the model and of the data each holds, and what they tell each other.

    rank = (replica * shards + shard) * sequence + part        all ranks = replicate x shard x sequence

Parameters are sharded over (shard x sequence) and copied `replicate` times, so FSDP2 sees ("replicate", "shard").
Micro-batches go to replicate x shard ranks; the `sequence` ranks behind one of them share its tokens.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from luffy.config import MeshConfig
from luffy.errors import UserError
from luffy.rank import round_of_ranks

T = TypeVar("T")
TIMEOUT = timedelta(days=1)  # of a collective: the watchdog speaks long before


@dataclass(frozen=True, kw_only=True)
class World:
    """What one rank knows of itself and the others. Whatever takes something from all of them is collective."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store
    params: DeviceMesh
    """What FSDP2 shards over: ("shard",), or ("replicate", "shard")."""
    data: DeviceMesh
    """("data", "sequence")."""

    @property
    def is_main(self) -> bool:
        """The one that writes files and talks."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which of the ranks that get micro-batches of their own, or share them with this one."""
        return self.data.get_local_rank("data")

    @property
    def data_ranks(self) -> int:
        """replicate x shard."""
        return self.data.size(0)

    @property
    def sequence_rank(self) -> int:
        """Which of those that share this one's tokens."""
        return self.data.get_local_rank("sequence")

    @property
    def sequence_ranks(self) -> int:
        return self.data.size(1)

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """The ranks that share this one's tokens; None where it has them to itself."""
        return self.data.get_group("sequence") if self.sequence_ranks > 1 else None

    def share(self, items: list[T]) -> list[T]:
        """This rank's part of what all ranks hold."""
        return items[self.rank :: self.size]

    def everyone(self, mine: T) -> list[T]:
        """What each rank has, by rank, on every rank. It travels between our own processes alone, and as a pickle."""
        if self.size == 1:
            return [mine]
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, mine)
        return parts

    def gather(self, items: list[T]) -> list[T]:
        """The inverse of `share`: everything, in its order, on every rank."""
        return self.whole(self.everyone(items))

    def whole(self, parts: list[list[T]]) -> list[T]:
        """The inverse of `share`, from the parts of all ranks."""
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]

    def sum(self, values: list[float]) -> list[float]:
        """Over ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def largest(self, values: list[float]) -> list[float]:
        """The same of the largest."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def barrier(self) -> None:
        """Until every rank is here."""
        self.sum([0.0])

    def _reduce(self, values: list[float], op: Any) -> list[float]:
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op)
        return tensor.tolist()


def start(config: MeshConfig) -> World:
    """Join the other ranks, as torchrun's environment says (gloo on CPU, NCCL on a GPU), or be the only one.

    Raises:
        UserError: the number of ranks does not divide into the mesh.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if dist.is_initialized():  # by whoever embeds the trainer
        store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    else:
        store, rank, size = _join("cpu:gloo,cuda:nccl" if cuda else "gloo")
    apart = config.replicate * config.sequence
    if size % apart:
        raise UserError(
            f"mesh: {size} ranks cannot be split into mesh.replicate {config.replicate} x mesh.sequence "
            f"{config.sequence}; start a multiple of {apart} ranks, or change the mesh"
        )
    shards = size // config.replicate
    params = (("replicate", config.replicate), ("shard", shards)) if config.replicate > 1 else (("shard", shards),)
    data = (("data", size // config.sequence), ("sequence", config.sequence))
    return World(
        rank=rank,
        size=size,
        device=device,
        store=store,
        params=_mesh(device, params),
        data=_mesh(device, data),
    )


def _join(backend: str) -> tuple[dist.Store, int, int]:
    """(store, rank, size) of the process group that is running now."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    # alone: an in-memory store, so that no port is opened
    if size == 1:
        store: dist.Store = dist.HashStore()
    else:  # with many nodes it outlives a restart of the ranks, and what earlier ones said with it
        store = dist.PrefixStore(round_of_ranks(), next(dist.rendezvous("env://", timeout=TIMEOUT))[0])
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    return store, rank, size


def _mesh(device: torch.device, dims: tuple[tuple[str, int], ...]) -> DeviceMesh:
    names, sizes = zip(*dims, strict=True)
    return init_device_mesh(device.type, sizes, mesh_dim_names=names)


@contextmanager
def joined(config: MeshConfig) -> Iterator[World]:
    """`start`; a process group that it begins ends with this, one of whoever embeds the trainer does not."""
    embedded = dist.is_initialized()
    try:
        yield start(config)
    finally:
        if not embedded:
            close()


def close() -> None:
    """End the process group, unless an engine that shut down has done so."""
    if dist.is_initialized():
        dist.destroy_process_group()
