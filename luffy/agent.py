"""Torch's elastic agent, with three changes: signals reach the ranks once and patiently, what the user must mend is not
tried again, and a job of one machine is reachable from that machine alone.

torchrun's agent answers SIGTERM by killing whoever has not ended 30 s later, answers Ctrl-C likewise, and sends both to
the verifier processes as well; here the ranks are told, and then given the time that their step takes.
"""

import os
import signal
import socket
import uuid
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

LOOPBACK = "127.0.0.1"


class Agent(LocalElasticAgent):
    """Starts the ranks of this node, watches and restarts them. `on_restart` gets the result that led to a restart."""

    def __init__(self, *args: Any, on_restart: Callable[[RunResult], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._on_restart = on_restart
        self._last: RunResult | None = None
        self._stopping = False

    def tell(self, number: signal.Signals) -> bool:
        """Pass a signal on to the ranks, once each and not to their children; False if none is running.

        After this a rank that ends is not started again.
        """
        self._stopping = True
        self._remaining_restarts = 0
        running = self._running()
        for process in running:
            process.send_signal(number)
        return bool(running)

    def kill(self) -> None:
        """The ranks and their children, now."""
        self._stopping = True
        for process in self._running():
            os.killpg(process.pid, signal.SIGKILL)  # each rank leads a session

    def _running(self) -> list[Any]:
        handlers = getattr(self._pcontext, "subprocess_handlers", {}).values()
        return [handler.proc for handler in handlers if handler.proc.poll() is None]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if self._stopping:
            raise KeyboardInterrupt
        # With many nodes the store that ranks meet in outlives a restart: LUFFY_ROUND keeps the rounds apart.
        assert worker_group.store is not None
        if worker_group.group_rank == 0:
            worker_group.store.set("luffy/round", uuid.uuid4().hex)
        os.environ["LUFFY_ROUND"] = worker_group.store.get("luffy/round").decode()
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = self._last = super()._monitor_workers(worker_group)
        if any(failure.exitcode == 2 for failure in result.failures.values()):
            self._remaining_restarts = 0  # bad input stays bad
        return result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if self._last is not None and self._last.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._on_restart(self._last)
        super()._restart_workers(worker_group)


class Loopback(RendezvousHandler):
    """The rendezvous of a job of one node: there is nobody to wait for.

    Its store listens on 127.0.0.1 only (a TCPStore opens its port on every interface of the machine), and is a new one
    for every start of the ranks.
    """

    def get_backend(self) -> str:
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        listening = socket.create_server((LOOPBACK, 0))
        port = listening.getsockname()[1]
        self._store = dist.TCPStore(
            LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        return RendezvousInfo(dist.PrefixStore("agent", self._store), 0, 1, RendezvousStoreInfo(LOOPBACK, port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return "luffy"

    def shutdown(self) -> bool:
        return True
