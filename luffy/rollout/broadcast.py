"""Weights straight into the memory of servers: rank 0 and the workers of all servers are one group, over NCCL where
they have GPUs and gloo where they do not. vLLM's weight-transfer endpoints take part; the sending end is ours, because
vLLM's gathers inside the streams that it sends on, which deadlocks with other ranks' gathers (docs/rollouts.md).

It can fail at any moment, for whoever is in the group may die. Then the ranks go on gathering, so that nobody waits for
anybody, and the caller sends the version as files.
"""

import math
import socket
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch

from luffy.errors import UserError
from luffy.rollout.client import Client, Refused, Unreachable
from luffy.rollout.transport import Named, drain, layers

BUFFER_BYTES, BUFFERS = 256 << 20, 2  # of vLLM's packing
Described = tuple[str, torch.dtype, tuple[int, ...]]
"""(name, type, shape) of a tensor that is to come."""


class Failed(Exception):
    """The broadcast did not reach everybody; the text says why."""


class Broadcast:
    """Of rank 0.

    address: of this machine, as the servers reach it.
    silence_s: that one tensor may take; over NCCL, which has no such limit, only `timeout_s` counts.
    timeout_s: of joining, and of all tensors.
    """

    def __init__(
        self, clients: Sequence[Client], device: torch.device, address: str, *, silence_s: float, timeout_s: float
    ) -> None:
        self._clients, self._device = list(clients), device
        self._address, self._silence_s, self._timeout_s = address, silence_s, timeout_s
        self._name: str | None = None
        self._group: Any = None

    def send(self, weights: Iterator[Named], described: Sequence[Described], version: int) -> dict[Client, list[str]]:
        """Every server's parameters that it has nothing for.

        Raises:
            Failed: some server may have the old weights, or a part of the new ones. `weights` is used up all the same.
            UserError: a collective hangs.
        """
        try:
            try:
                if self._name is None or any(client.group() != self._name for client in self._clients):
                    self._connect()
            except BaseException:
                drain(weights)
                raise
            return self._send(weights, described, version)
        except (Unreachable, Refused, Failed) as error:
            self._name = self._group = None
            self._tidy()
            raise Failed(str(error)) from error

    def _tidy(self) -> None:
        """Servers that are left would take no other update while one is open. What they have is nobody's: they stay
        paused until they have a version of files."""
        for client in self._clients:
            for step in (client.set_version, client.finish_update):
                with suppress(Unreachable, Refused):
                    step(-1)

    def _connect(self) -> None:
        """One group of all workers: servers' ranks follow each other."""
        sizes = [client.workers() for client in self._clients]
        try:
            listening = socket.create_server((self._address, 0))  # nowhere else: whoever joins could send weights
        except OSError as error:
            raise UserError(
                f"rollout.address: {self._address} is no address of this machine ({error.strerror}); name the one at "
                f"which servers reach it"
            ) from error
        name, port = uuid.uuid4().hex, listening.getsockname()[1]
        about = {"master_address": self._address, "master_port": port, "world_size": 1 + sum(sizes), "name": name}
        about |= {"packed": True, "packed_buffer_size_bytes": BUFFER_BYTES, "packed_num_buffers": BUFFERS}
        about |= {"timeout_s": self._silence_s}
        calls = [
            (client.join, about | {"rank_offset": 1 + sum(sizes[:number])})
            for number, client in enumerate(self._clients)
        ]
        self._group = self._beside(lambda: self._join(listening, port, 1 + sum(sizes)), calls)
        self._name = name

    def _join(self, listening: socket.socket, port: int, size: int) -> Any:
        if self._device.type == "cuda":
            from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
            from vllm.distributed.utils import StatelessProcessGroup
            from vllm.utils.nccl import unpinned_nccl_env

            group = StatelessProcessGroup.create(
                self._address, port, 0, size, store_timeout=math.ceil(self._silence_s), listen_socket=listening
            )
            with unpinned_nccl_env():
                return PyNcclCommunicator(group, device=self._device)
        from vllm.distributed.utils import stateless_init_torch_distributed_process_group

        timeout = timedelta(seconds=self._silence_s)
        return stateless_init_torch_distributed_process_group(
            self._address, port, 0, size, "gloo", timeout=timeout, listen_socket=listening
        )

    def _send(self, weights: Iterator[Named], described: Sequence[Described], version: int) -> dict[Client, list[str]]:
        names, types, shapes = zip(*described, strict=True)
        told = {"names": names, "dtype_names": [str(t).removeprefix("torch.") for t in types], "shapes": shapes}
        with ThreadPoolExecutor(len(self._clients)) as pool:
            try:
                for step in (Client.pause, Client.start_update):
                    list(pool.map(step, self._clients))
            except BaseException:
                drain(weights)
                raise
            self._beside(lambda: self._put(weights), [(client.receive, told) for client in self._clients])
            missing = dict(zip(self._clients, pool.map(lambda c: c.finish_update(version), self._clients), strict=True))
            list(pool.map(Client.resume, self._clients))
        return missing

    def _put(self, weights: Iterator[Named]) -> None:
        try:
            self._put_all(named for layer in layers(weights) for named in layer)
        finally:
            drain(weights)

    def _put_all(self, stream: Iterator[Named]) -> None:
        if self._device.type != "cuda":
            for _, tensor in stream:
                self._group.broadcast(tensor.contiguous(), 0).wait()
            return
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        gathering = torch.cuda.current_stream()
        packed_nccl_broadcast_producer(
            _on(gathering, stream), self._group, 0, lambda named: named[1], BUFFER_BYTES, BUFFERS
        )

    def _beside(self, mine: Any, calls: Sequence[tuple[Any, dict[str, Any]]]) -> Any:
        """`mine` in a thread, which a collective without a timeout may keep for ever, and the servers' calls in others;
        whatever fails first is raised, once `mine` has ended.

        Raises:
            Failed, Unreachable, Refused. UserError: `mine` does not end.
        """
        found: Future[Any] = Future()

        def run() -> None:
            try:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)
                found.set_result(mine())
            except Exception as error:
                found.set_exception(Failed(": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])))

        threading.Thread(target=run, name="broadcast", daemon=True).start()
        pool = ThreadPoolExecutor(len(calls), thread_name_prefix="receivers")
        try:
            futures = [found, *(pool.submit(call, given, self._timeout_s) for call, given in calls)]
            for future in as_completed(futures, timeout=self._timeout_s):
                future.result()
        except TimeoutError:
            raise Failed(f"not done within {self._timeout_s:.0f} s") from None
        finally:
            pool.shutdown(wait=False)
            if not wait([found], timeout=self._silence_s).done:
                raise UserError(
                    "rollout: a broadcast of weights hangs, for a server has left it; resume the run, and set "
                    "rollout.transport = files if it happens again"
                )
        return found.result()


def _on(stream: Any, named: Iterator[Named]) -> Iterator[Named]:
    """The same, each worked out on `stream`, whichever one whoever asks for it is on."""
    while True:
        with torch.cuda.stream(stream):
            found = next(named, None)
        if found is None:
            return
        yield found
