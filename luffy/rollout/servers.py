"""Rollouts from any number of vLLM servers, started here or given as addresses.

Every rank asks the servers for its own prompts, from one queue: whoever is free takes the next, and what a server that
died or hangs had taken goes back into the queue. Rank 0 starts the servers, watches them and starts them again, with
the newest weights. An answer counts only if the weights that sampled it are those that were asked for.
"""

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlparse
from weakref import WeakSet

import torch
import torch.distributed as dist

from luffy.config import RolloutConfig
from luffy.console import say
from luffy.distributed import World
from luffy.errors import UserError
from luffy.rollout.asking import Ask, Asking, Counts
from luffy.rollout.broadcast import Broadcast, Described, Failed
from luffy.rollout.client import Client, Params, Refused, Unreachable
from luffy.rollout.engine import Completion, Ids, Request
from luffy.rollout.server import Server, options_of
from luffy.rollout.transport import Named, drain, version_folder, write_version
from luffy.weights import described, hf_weights

if TYPE_CHECKING:
    from luffy.model import Policy

T = TypeVar("T")
COUNTED = ("asked_again", "refused", "server_restarts", "updates_missed", "broadcasts_failed")
DEATHS = 3
"""Times in a row that a server may end before it has answered once."""


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
        vocabulary: int,
        max_model_len: int,
        folder: Path,
        world: World,
        version: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        self.config, self.world, self.version = config, world, version
        self.eos_token_id, self.max_model_len, self.vocabulary = eos_token_id, max_model_len, vocabulary
        self.folder = folder
        self._model, self._written = path, version  # what a server is started with, and the version that this is
        self._known = version  # the newest, which servers may have from a broadcast alone
        self._own: list[Server] = []
        self._counts = Counts(*(f"rollout/{what}" for what in COUNTED))
        self._changing = threading.RLock()  # of weights and of servers
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="servers", daemon=True)
        self._fatal: str | None = None
        self._active: WeakSet[Asking[Completion]] = WeakSet()
        if world.is_main:  # what a kill has left
            shutil.rmtree(folder / "weights", ignore_errors=True)
        try:
            self.clients = self._connect(options_of(
                config, dtype=dtype, max_model_len=max_model_len, trust_remote_code=trust_remote_code
            ))  # fmt: skip
        except BaseException:
            self.close()
            raise
        self._broadcast = Broadcast(
            self.clients, world.device, config.address, silence_s=config.probe_s, timeout_s=config.server_wait_s
        )
        if self.world.is_main:
            self._watcher.start()

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
            if self.config.transport == "broadcast" and (client.version() or 0) < at_least:
                raise Unreachable(f"{client.url} was started again and waits for the next version")
            found = client.generate(request.prompt, params, str(self.version), name)
            if any(span.version < at_least for completion in found for span in completion.versions):
                raise Unreachable(f"{client.url} has older weights than version {at_least}")
            return found

        most = max((request.count for request in requests), default=1)
        asking = self._ask(range(len(requests)), ask, max(1, self.config.max_sequences // most))
        self._active.add(asking)
        return asking

    def score(self, sequences: Sequence[Ids]) -> list[list[float]]:
        def ask(client: Client, i: int, name: str) -> list[float]:
            return client.score(sequences[i], str(self.version))

        found: dict[int, list[float]] = {}
        asking = self._ask(range(len(sequences)), ask, 8)
        while asking.waiting:
            found.update(asking.take(timeout=60))
        return [found[i] for i in range(len(sequences))]

    def _ask(self, tasks: Sequence[int], ask: Ask[T], at_once: int) -> Asking[T]:
        return Asking(
            tasks,
            ask,
            self.clients,
            at_once=at_once,
            trouble=self._trouble,
            counts=self._counts,
        )

    def _trouble(self, silence_s: float) -> str | None:
        """What ends the run. A server may take long over long answers: then its engine says that it is there."""
        why = self._fatal
        if not why and silence_s > self.config.server_wait_s and not any(map(self._is_there, self.clients)):
            why = f"no server has answered for {self.config.server_wait_s:.0f} s"
        return f"rollout: {why}; logs are in {self.folder}" if why else None

    @staticmethod
    def _is_there(client: Client) -> bool:
        try:
            client.version()
        except Unreachable:
            return False
        return True

    # --- weights ---------------------------------------------------------------------------------------------------

    def sync(self, policy: "Policy", dtype: torch.dtype, version: int) -> int:
        names = described(policy, dtype)
        if self.config.transport == "files" or not self._send(hf_weights(policy, dtype), names, version):
            self._write(hf_weights(policy, dtype), policy, version)
        self.world.barrier()
        self.version = version
        return len(names)

    def _send(self, weights: Iterator[Named], names: Sequence[Described], version: int) -> bool:
        """By broadcast; whether everybody has them. Collective."""
        sent = False
        if self.world.is_main:
            with self._changing:
                try:
                    for client, missing in self._broadcast.send(weights, names, version).items():
                        self._refuse_missing(client, missing)
                    self._known, sent = version, True
                except Failed as error:
                    self._counts.add("rollout/broadcasts_failed")
                    say(f"rollout: weights could not be broadcast ({error}); they are written to files")
        drain(weights)
        return bool(self.world.largest([sent])[0])

    def _write(self, weights: Iterator[Named], policy: "Policy", version: int) -> None:
        target = version_folder(self.folder / "weights", version)
        write_version(target, weights, policy.lm.config, write=self.world.is_main)
        if not self.world.is_main:
            return
        with self._changing:
            before, self._model = self._model, str(target)
            self._known = self._written = version
            with ThreadPoolExecutor(len(self.clients)) as pool:
                list(pool.map(self._bring_up_to_date, self.clients))
        if Path(before).parent == target.parent and before != str(target):
            shutil.rmtree(before, ignore_errors=True)

    def _bring_up_to_date(self, client: Client) -> None:
        """One that does not answer is left to the watcher, which gives it the newest weights when it does."""
        try:
            if not Path(self._model).is_dir():  # of the hub: nothing has been written yet, and it was started with that
                client.set_version(self._written)
                return
            missing = client.update(self._model, self._written, self.config.server_wait_s)
        except Unreachable:
            self._counts.add("rollout/updates_missed")
            return
        except Refused as error:
            raise UserError(f"rollout: a server does not take weights: {error}") from error
        self._refuse_missing(client, missing)

    @staticmethod
    def _refuse_missing(client: Client, missing: list[str]) -> None:
        if missing:
            raise UserError(
                f"rollout: {client.url} has nothing for {missing[0]} ({len(missing)} parameters) after a sync"
            )

    # --- servers ---------------------------------------------------------------------------------------------------

    def _connect(self, options: list[str]) -> list[Client]:
        """Clients of all servers, on every rank."""
        found: list[Any] = [None]
        if self.world.is_main:
            urls = list(self.config.urls)
            key = os.environ.get("LUFFY_API_KEY")
            for url in urls:
                if urlparse(url).hostname not in ("localhost", "127.0.0.1", "::1") and not key:
                    say(f"rollout: {url} is on another machine and LUFFY_API_KEY is not set: anybody there may use it")
            if not urls:
                logs = self.folder / "servers"
                self._own = [
                    Server(n, options, self.config, logs / f"server-{n}.log") for n in range(self.config.servers)
                ]
                for server in self._own:
                    server.start(self._model)
                for server in self._own:
                    server.wait_ready()
            found = [[(s.client.url, s.key) for s in self._own] or [(url, key) for url in urls]]
        if self.world.size > 1:
            dist.broadcast_object_list(found)
        connections = self.config.max_sequences
        clients = [s.client for s in self._own] or [Client(url, key, connections) for url, key in found[0]]
        if self.world.is_main:
            for client in clients:
                self._check(client)
                if self._own:
                    client.set_version(self.version)
                else:  # a resumed run goes on from other weights than its owner started it with
                    self._bring_up_to_date(client)
        self.world.barrier()
        return clients

    def _check(self, client: Client) -> None:
        try:
            about = client.describe()
        except Unreachable as error:
            raise UserError(
                f"rollout: no server answers at {client.url} ({error}); start it, or mend rollout.urls"
            ) from error
        except Refused as error:
            raise UserError(
                f"rollout: {client.url} is no server of this trainer ({error}); start it by "
                f"python -m luffy.rollout.serve"
            ) from error
        if about["vocabulary"] != self.vocabulary:
            raise UserError(
                f"rollout: {client.url} has another model: its vocabulary has {about['vocabulary']} entries, and the "
                f"trainer's {self.vocabulary}"
            )
        if about["positions"] < self.max_model_len:
            raise UserError(
                f"rollout: {client.url} takes sequences of {about['positions']} tokens, and this run needs "
                f"{self.max_model_len}; start it with --max-model-len {self.max_model_len}"
            )

    def _watch(self) -> None:
        """Of the thread on rank 0: servers that died, hang or have older weights. What goes wrong here ends the run,
        for nobody would look after the servers any more."""
        deaths: Counter[int] = Counter()
        asked = dict.fromkeys(self.clients, time.monotonic())
        try:
            while not self._closing.wait(1.0) and not self._fatal:
                with self._changing:
                    for server in self._own:
                        if not self._closing.is_set() and not (server.alive and self._answers(server.client, asked)):
                            self._start_again(server, deaths)
                            asked[server.client] = time.monotonic()
                    if not self._own:
                        self._refresh()
        except Exception as error:
            self._fatal = str(error) or type(error).__name__

    def _start_again(self, server: Server, deaths: Counter[int]) -> None:
        deaths[server.number] += 1
        self._counts.add("rollout/server_restarts")
        how = f"hangs (no word within {self.config.probe_s:g} s)" if server.alive else "has died"
        say(f"rollout: server {server.number} {how}; it is started again")
        server.kill()
        if deaths[server.number] > DEATHS:
            self._fatal = f"server {server.number} ended {DEATHS} times: {server.last_error()}"
            return
        try:
            server.start(self._model)
            server.wait_ready(self._closing.is_set)
            server.client.set_version(self._written)
            deaths[server.number] = 0
        except (UserError, Unreachable) as error:
            say(str(error))

    def _answers(self, client: Client, asked: dict[Client, float]) -> bool:
        """Asks its engine now and then: a server may be alive and hang. Between two steps of decoding an engine
        answers, however many requests it has."""
        if time.monotonic() - asked[client] < self.config.probe_s / 2:
            return True
        asked[client] = time.monotonic()
        try:
            client.version(self.config.probe_s)
        except Unreachable:
            return False
        return True

    def _refresh(self) -> None:
        """Servers of others that were started again: the newest weights that there are files of, once they answer."""
        for client in self.clients:
            try:
                if client.version() not in (self._known, self._written):
                    self._bring_up_to_date(client)
            except Unreachable:
                continue

    def abort(self) -> None:
        for asking in list(self._active):
            asking.abort()

    def metrics(self) -> dict[str, float]:
        return self._counts.drain()

    def close(self) -> None:
        self._closing.set()
        for server in self._own:
            server.kill()
        if self._watcher.is_alive():
            self._watcher.join(timeout=10)
        for server in self._own:  # the watcher may have been starting one
            server.close()
        shutil.rmtree(self.folder / "weights", ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
