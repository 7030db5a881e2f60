"""Rollouts from any number of vLLM servers, started here or given as addresses.

Every rank asks the servers for its own prompts, from one queue (`asking.py`). Rank 0 starts the servers, looks after
them (`fleet.py`) and hands out weights, as files or by broadcast. An answer counts only if the weights that sampled it
are not older than those that were asked for.
"""

import os
import shutil
import socket
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlparse
from weakref import WeakSet

import torch
import torch.distributed as dist

from luffy import versions
from luffy.config import RolloutConfig
from luffy.console import say
from luffy.distributed import World
from luffy.errors import UserError
from luffy.rollout.asking import Ask, Asking, Counts
from luffy.rollout.broadcast import Broadcast, Described, Failed
from luffy.rollout.client import Client, Cut, Params, Refused, Unreachable
from luffy.rollout.engine import Completion, Ids, Request
from luffy.rollout.fleet import Fleet
from luffy.rollout.server import Server, options_of
from luffy.rollout.transport import Named, drain, version_folder, write_version
from luffy.weights import described, hf_weights

if TYPE_CHECKING:
    from luffy.model import Policy

T = TypeVar("T")
COUNTED = ("asked_again", "refused", "server_restarts", "updates_missed", "broadcasts_failed")
UNKNOWN = -1
"""Version of weights that nobody vouches for."""


class Servers:
    """path: model folder or hub id of the weights that count as `version`. folder: of this run, for weights and logs.

    Raises:
        UserError: a server does not start, cannot be reached, or has another model.
    """

    def __init__(
        self,
        path: str,
        config: RolloutConfig,
        *,
        dtype: str,
        eos_token_id: int,
        sizes: dict[str, int],
        max_model_len: int,
        folder: Path,
        world: World,
        version: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        self.config, self.world, self.folder = config, world, folder
        # whoever started the servers of `urls` may have left other weights in them
        self.version = UNKNOWN if config.urls else version
        self.eos_token_id, self.max_model_len, self.sizes = eos_token_id, max_model_len, sizes
        self._counts = Counts(*(f"rollout/{what}" for what in COUNTED))
        self._syncing = False
        self._beginning = threading.Lock()
        self._active: WeakSet[Asking[Completion]] = WeakSet()
        options = options_of(config, dtype=dtype, max_model_len=max_model_len, trust_remote_code=trust_remote_code)
        if world.is_main:  # what a kill has left
            shutil.rmtree(folder / "weights", ignore_errors=True)
        own = self._start(path, options)
        try:
            self.clients = self._meet(own)
        except BaseException:
            for server in own:
                server.close()
            raise
        self.fleet = Fleet(
            own, self.clients, config, self._counts, model=path, version=self.version, leads=world.is_main
        )
        self._broadcast = Broadcast(
            self.clients, world.device, config.address, silence_s=config.probe_s, timeout_s=config.server_wait_s
        )

    # --- rollouts --------------------------------------------------------------------------------------------------

    def awake(self) -> AbstractContextManager[None]:
        return nullcontext()

    def begin(self, requests: Sequence[Request], temperature: float) -> Asking[Completion]:
        at_least = self.version

        def ask(client: Client, i: int, name: str) -> list[Completion]:
            request = requests[i]
            params: Params = {"n": request.count, "temperature": temperature, "max_tokens": request.max_tokens}
            params |= {"stop_token_ids": [self.eos_token_id], "detokenize": False, "logprobs": 0}
            params |= {"seed": request.seed} if temperature else {}
            params |= {"top_p": request.top_p} if request.top_p < 1 else {}
            if self._version_of(client) < at_least:
                raise Unreachable(f"{client.url} was started again and waits for weights")
            try:
                found = client.generate(request.prompt, params, self._salt, name)
            except Cut as cut:
                self._refuse_older(client, cut.completions, at_least)
                raise
            self._refuse_older(client, found, at_least)
            return found

        most = max((request.count for request in requests), default=1)
        asking = self._ask(range(len(requests)), ask, max(1, self.config.max_sequences // most))
        with self._beginning:
            self._active.add(asking)
        return asking.start()

    def score(self, sequences: Sequence[Ids]) -> list[list[float]]:
        def ask(client: Client, i: int, name: str) -> list[float]:
            return client.score(sequences[i], self._salt)

        found: dict[int, list[float]] = {}
        asking = self._ask(range(len(sequences)), ask, 8).start()
        while asking.waiting:
            found.update(asking.take(timeout=60))
        return [found[i] for i in range(len(sequences))]

    def _ask(self, tasks: Sequence[int], ask: Ask[T], at_once: int) -> Asking[T]:
        turn = self.world.rank % len(self.clients)  # ranks begin with different servers
        return Asking(
            tasks,
            ask,
            self.clients[turn:] + self.clients[:turn],
            at_once=at_once,
            trouble=self._trouble,
            counts=self._counts,
        )

    @property
    def _salt(self) -> str:
        """Requests of one salt share cached prefixes. While a sync goes on nobody knows whose weights computed them."""
        return uuid.uuid4().hex if self._syncing else str(self.version)

    @staticmethod
    def _refuse_older(client: Client, found: list[Completion], least: int) -> None:
        if any(span.version < least for completion in found for span in completion.versions):
            raise Unreachable(f"{client.url} has older weights than version {least}")

    def _trouble(self, silence_s: float) -> str | None:
        """What ends the run. A server may take long over long answers: then its engine says that it is there."""
        why = self.fleet.fatal
        if not why and silence_s > self.config.server_wait_s and not any(map(self._is_there, self.clients)):
            why = f"no server with weights of version {self.version} has answered for {self.config.server_wait_s:.0f} s"
        return f"rollout: {why}; logs are in {self.folder}; what is saved can be resumed" if why else None

    @staticmethod
    def _version_of(client: Client) -> int:
        version = client.version()
        return UNKNOWN if version is None else version

    def _is_there(self, client: Client) -> bool:
        try:
            return self._version_of(client) >= self.version
        except Unreachable:
            return False

    # --- weights ---------------------------------------------------------------------------------------------------

    def sync(self, policy: "Policy", dtype: torch.dtype, version: int) -> int:
        names = described(policy, dtype)
        self._syncing = True
        if self.config.transport == "files" or not self._send(hf_weights(policy, dtype), names, version):
            self._write(hf_weights(policy, dtype), policy, version)
        self.world.barrier()
        self.version, self._syncing = version, False
        return len(names)

    def load(self, folder: Path, version: int) -> None:
        """The weights of a folder that the servers see too, into all of them."""
        self.fleet.hand_out(folder, version, tidy=False)
        self.version = version

    def _send(self, weights: Iterator[Named], names: Sequence[Described], version: int) -> bool:
        """By broadcast; whether everybody has them. Collective."""
        sent = False
        if self.world.is_main:
            try:
                self.fleet.hand_out_by(lambda: self._broadcast.send(weights, names, version), version)
                sent = True
            except Failed as error:
                self._counts.add("rollout/broadcasts_failed")
                say(f"rollout: weights could not be broadcast ({error}); they are written to files")
        drain(weights)
        return bool(self.world.largest([sent])[0])

    def _write(self, weights: Iterator[Named], policy: "Policy", version: int) -> None:
        target = version_folder(self.folder / "weights", version)
        write_version(target, weights, policy.lm.config, write=self.world.is_main)
        if self.world.is_main:
            self.fleet.hand_out(target, version)

    # --- servers ---------------------------------------------------------------------------------------------------

    def _start(self, path: str, options: list[str]) -> list[Server]:
        """Rank 0's, where none are named."""
        if self.config.urls:
            return []
        if len(set(self.world.everyone(socket.gethostname()))) > 1:
            raise UserError(
                "rollout: ranks on several machines cannot reach servers on one's loopback; start servers with "
                "python -m luffy.rollout.serve and name them in rollout.urls"
            )
        logs = self.folder / "servers"
        numbers = range(self.config.servers if self.world.is_main else 0)
        own = [Server(number, options, self.config, logs / f"server-{number}.log") for number in numbers]
        try:
            for server in own:
                server.start(path)
            for server in own:
                server.wait_ready()
        except BaseException:
            for server in own:
                server.close()
            raise
        return own

    def _meet(self, own: list[Server]) -> list[Client]:
        """Clients of all servers, on every rank."""
        key = os.environ.get("LUFFY_API_KEY")
        found: list[Any] = [[(s.client.url, s.key) for s in own] or [(url, key) for url in self.config.urls]]
        if self.world.size > 1:
            dist.broadcast_object_list(found)
        clients = [s.client for s in own] or [Client(url, key, self.config.max_sequences) for url, key in found[0]]
        if self.world.is_main:
            for client in clients:
                if not own:
                    warn_if_open(client.url, key)
                self._check(client)
                if own:
                    client.set_version(self.version)
                else:
                    client.resume()  # a trainer that was killed may have left it paused
        self.world.barrier()
        return clients

    def _check(self, client: Client) -> None:
        try:
            about = client.describe()
        except Unreachable as error:
            raise UserError(
                f"rollout: no server answers at {client.url} ({error}); start it, or mend rollout.urls (--urls)"
            ) from error
        except Refused as error:
            raise UserError(
                f"rollout: {client.url} is no server of this trainer ({error}); start it by "
                f"python -m luffy.rollout.serve"
            ) from error
        for what, size in self.sizes.items():
            if about["sizes"].get(what) != size:
                raise UserError(
                    f"rollout: {client.url} has another model: its {what} is {about['sizes'].get(what)}, and the "
                    f"trainer's {size}; start it with the run's model.name"
                )
        for package, version in versions.of_rollouts().items():
            if about["versions"].get(package, version) != version:
                raise UserError(
                    f"rollout: {client.url} runs {package} {about['versions'][package]}, and the trainer {version}; "
                    f"install the same on both"
                )
        if about["positions"] < self.max_model_len:
            raise UserError(
                f"rollout: {client.url} takes sequences of {about['positions']} tokens, and this run needs "
                f"{self.max_model_len}; start it with --max-model-len {self.max_model_len}"
            )

    def abort(self) -> None:
        with self._beginning:
            for asking in list(self._active):
                asking.abort()

    def metrics(self) -> dict[str, float]:
        return self._counts.drain()

    def close(self) -> None:
        self.fleet.close()
        if self.world.is_main:
            shutil.rmtree(self.folder / "weights", ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def warn_if_open(url: str, key: str | None) -> None:
    if urlparse(url).hostname not in ("localhost", "127.0.0.1", "::1") and not key:
        say(f"rollout: {url} is on another machine and LUFFY_API_KEY is not set: anybody there may use it")
