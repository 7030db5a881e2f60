"""`luffy train --nproc-per-node N`: the ranks of this node as processes, and the other nodes through a rendezvous.

The ranks run `python -m luffy train ...` with the same arguments. This process only starts, watches and restarts them;
what they print goes through untouched, and after a failure it adds one sentence: whose, and why. It imports torch when
it starts ranks, so that the command's help and a mistyped option answer at once.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luffy.commands.arguments import whole
from luffy.errors import UserError
from luffy.failure import verdict

if TYPE_CHECKING:
    from luffy.agent import Agent

JOIN_TIMEOUT_S = 900
EXIT_TIMEOUT_S = 300  # that a node waits for the others at the end


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How many ranks, and where; `ranks_per_node` None: no launcher, this process is the only rank."""

    ranks_per_node: int | None = None
    nodes: tuple[int, int] = (1, 1)
    """(at least, at most)."""
    node_rank: int | None = None
    endpoint: str | None = None
    run_id: str = "luffy"
    local_addr: str | None = None
    max_restarts: int = 0
    stopped_exit: int = 0

    @property
    def wanted(self) -> bool:
        return self.ranks_per_node is not None


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many ranks (docs/multi-node.md)", "They can also be started by torchrun itself.")
    group.add_argument("--nproc-per-node", metavar="N|gpu", help="ranks on this node; gpu: one for each GPU")
    group.add_argument("--nnodes", metavar="N|MIN:MAX", help="nodes, each of which runs this command (default: 1)")
    group.add_argument("--rdzv-endpoint", metavar="HOST[:PORT]", help="where the nodes meet: at one of them")
    group.add_argument("--rdzv-id", metavar="ID", help="name of the job, the same on all nodes (default: luffy)")
    group.add_argument("--rdzv-backend", choices=("c10d",), help="torch's own, which needs no other service")
    group.add_argument(
        "--node-rank", type=whole, metavar="R", help="node 0 is the one at --rdzv-endpoint (default: SLURM's)"
    )
    group.add_argument("--local-addr", metavar="HOST", help="this node's address for the others (default: its name)")
    group.add_argument("--max-restarts", type=whole, metavar="K", help="start again after a failure, K times at most")
    group.add_argument(
        "--stopped-exit", type=whole, metavar="CODE", help="exit code after a save on SIGTERM (default: 0)"
    )


def parse(args: argparse.Namespace) -> Launch:
    """
    Raises:
        UserError: options that do not make a job.
    """
    given = [name for name in _OPTIONS if getattr(args, name) is not None]
    if not given:
        return Launch()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError(f"train: {_flag(given[0])} was given to a rank that torchrun has started; give it to torchrun")
    if args.nproc_per_node is None:
        raise UserError(f"train: {_flag(given[0])} needs --nproc-per-node, the number of ranks on each node")
    nodes = _nodes(args.nnodes or "1")
    if nodes[1] > 1 and not args.rdzv_endpoint:
        raise UserError("train: more than one node needs --rdzv-endpoint HOST:PORT, the same on all of them")
    for name in ("max_restarts", "node_rank", "stopped_exit"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 255:
            raise UserError(f"train: {_flag(name)} must lie between 0 and 255, got {value}")
    return Launch(
        ranks_per_node=_ranks(args.nproc_per_node),
        nodes=nodes,
        node_rank=args.node_rank,
        endpoint=args.rdzv_endpoint,
        run_id=args.rdzv_id or "luffy",
        local_addr=args.local_addr,
        max_restarts=args.max_restarts or 0,
        stopped_exit=args.stopped_exit or 0,
    )


_OPTIONS = (
    *("nproc_per_node", "nnodes", "rdzv_endpoint", "rdzv_id", "rdzv_backend"),
    *("node_rank", "local_addr", "max_restarts", "stopped_exit"),
)


def start(launch: Launch, command: list[str]) -> int:
    """Run `command` (arguments of this Python) as every rank of this node; returns the exit code of the job.

    0 done; `launch.stopped_exit` after SIGTERM, 130 after Ctrl-C; otherwise that of the rank that failed first.

    Raises:
        UserError: the nodes do not find each other.
    """
    assert launch.ranks_per_node
    _environment(launch)
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError

    from luffy.agent import Agent

    _quiet_agent()
    ranks = launch.ranks_per_node * launch.nodes[1]
    with tempfile.TemporaryDirectory(prefix="luffy-") as notes:
        try:
            rendezvous = _rendezvous(launch)
        except RendezvousError as error:
            raise UserError(f"train: nobody answers at --rdzv-endpoint {launch.endpoint}; is node 0 up?") from error
        spec = WorkerSpec(
            role="luffy",
            local_world_size=launch.ranks_per_node,
            entrypoint=sys.executable,
            args=tuple(command),
            rdzv_handler=rendezvous,
            max_restarts=launch.max_restarts,
            monitor_interval=0.1,
            local_addr=_local_addr(launch),
        )
        agent = Agent(
            spec,
            DefaultLogsSpecs(log_dir=notes),
            exit_barrier_timeout=EXIT_TIMEOUT_S,
            on_restart=lambda result: _say(verdict(result.failures, ranks)[0] + "; starting all ranks again"),
        )
        try:
            with _signals_for(agent) as asked:
                result = agent.run()
        except KeyboardInterrupt:  # a second Ctrl-C, or the first signal before there was any rank
            return launch.stopped_exit if signal.SIGTERM in asked else 130
        except RendezvousClosedError:
            raise UserError("train: another node has ended the job; its output says why") from None
        except RendezvousError as error:
            raise UserError(f"train: not all nodes came to {launch.endpoint} within {JOIN_TIMEOUT_S} s") from error
        finally:
            rendezvous.shutdown()
        stopped = stopped_notes(Path(notes))
    if result.failures and not (asked and all(f.exitcode in STOPPED_EARLY for f in result.failures.values())):
        sentence, code = verdict(result.failures, ranks)
        _say(sentence)
        return code
    if signal.SIGINT in asked or "130" in stopped:
        return 130
    return launch.stopped_exit if asked or stopped else 0


def stopped_notes(folder: Path) -> set[str]:
    """What the ranks of the last start wrote when they had stopped as asked (`luffy.rank.exit_code`). One of an earlier
    start may have saved and stopped while another died, and has gone on since."""
    attempts = {int(path.name.removeprefix("attempt_")): path for path in folder.glob("*/attempt_*")}
    return {note.read_text() for note in attempts[max(attempts)].rglob("stopped")} if attempts else set()


STOPPED_EARLY = (-signal.SIGTERM, -signal.SIGINT, 130)
"""How ranks end that were told to stop before they had a step to finish."""


@contextmanager
def _signals_for(agent: "Agent") -> Iterator[list[signal.Signals]]:
    """The first Ctrl-C or SIGTERM is passed on, a second Ctrl-C kills; yields what has come so far."""
    asked: list[signal.Signals] = []

    def handle(number: int, _: Any) -> None:
        told = signal.Signals.SIGINT if number == signal.SIGINT else signal.Signals.SIGTERM
        if told == signal.SIGINT and told in asked:
            agent.kill()
            raise KeyboardInterrupt
        asked.append(told)
        if not agent.tell(told):
            raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment(launch: Launch) -> None:
    """What ranks inherit."""
    assert launch.ranks_per_node
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // launch.ranks_per_node)))
    os.environ["LUFFY_LAUNCHER"] = str(os.getpid())
    # Signals are ours. The agent would install its own at each start of the ranks; it has no setting for "none", and
    # skips names that it does not know.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "none"
    if _local_addr(launch):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # of whatever started this node
        os.environ.pop(name, None)


def _local_addr(launch: Launch) -> str | None:
    """Loopback for one node, or for nodes that meet on it."""
    if launch.nodes[1] == 1:
        return "127.0.0.1"
    host = (launch.endpoint or "").rsplit(":", 1)[0]
    return launch.local_addr or ("127.0.0.1" if host in ("localhost", "127.0.0.1") else None)


def _rendezvous(launch: Launch):
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    from luffy.agent import Loopback

    if launch.nodes[1] == 1:
        return Loopback()
    options: dict[str, Any] = {"timeout": JOIN_TIMEOUT_S}
    # left to find out by their names which of them hosts the rendezvous, two that start at once may both wait
    node = os.environ.get("SLURM_NODEID") if launch.node_rank is None else launch.node_rank
    if node is not None:
        options["is_host"] = int(node) == 0
    return get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d",
            endpoint=launch.endpoint or "",
            run_id=launch.run_id,
            min_nodes=launch.nodes[0],
            max_nodes=launch.nodes[1],
            local_addr=_local_addr(launch),
            **options,
        )
    )


def _quiet_agent() -> None:
    """The agent logs each signal and exit with advice for programmers; LOGLEVEL (torch's own switch) brings it back."""
    import logging

    if "LOGLEVEL" not in os.environ:
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _ranks(text: str) -> int:
    if text == "gpu":
        import torch

        if not (count := torch.cuda.device_count()):
            raise UserError("train: --nproc-per-node gpu finds no GPU here; give the number of ranks")
        return count
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"train: --nproc-per-node must be a positive number or gpu, got {text}")
    return int(text)


def _nodes(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    with suppress(ValueError):
        nodes = int(least), int(most or least)
        if 1 <= nodes[0] <= nodes[1]:
            return nodes
    raise UserError(f"train: --nnodes must be a positive number or MIN:MAX, got {text}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
