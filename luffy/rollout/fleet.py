"""The servers of a run: which weights they are to have, and a thread that looks after them.

Those that this run has started are started again when they die or hang, with the newest weights that there are files
of. Those of others are asked nothing while they are silent, and brought up to date when they come back. Nothing here
waits for a server to start, so one that does keeps neither an update nor the others waiting.
"""

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from luffy.config import RolloutConfig
from luffy.console import say
from luffy.errors import UserError
from luffy.rollout.asking import Counts
from luffy.rollout.client import Client, Refused, Unreachable
from luffy.rollout.server import START_S, Server

DEATHS = 3
"""Times in a row that a server may end before it has answered once."""


class Fleet:
    """own: servers of this process, started; their clients are among `clients`. model, version: what they were started
    with. leads: whether this rank hands out weights."""

    def __init__(
        self,
        own: Sequence[Server],
        clients: Sequence[Client],
        config: RolloutConfig,
        counts: Counts,
        *,
        model: str,
        version: int,
        leads: bool,
    ) -> None:
        self.own, self.clients, self.config, self.counts = list(own), list(clients), config, counts
        self.model, self.written, self.known = model, version, version
        self.fatal: str | None = None
        self._leads, self._handed_out = leads, False
        self._changing = threading.RLock()  # of weights
        self._starting: dict[int, int] = {}  # number of a server -> version that it was started with
        self._starting_with: dict[int, str] = {}  # and the folder
        self._loading: set[Client] = set()
        self._deaths: Counter[int] = Counter()
        self._heard = dict.fromkeys(self.clients, time.monotonic())
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="servers", daemon=True)
        if own or config.urls:
            self._watcher.start()

    # --- weights ---------------------------------------------------------------------------------------------------

    def hand_out(self, folder: Path, version: int, *, tidy: bool = True) -> None:
        """Files of a version, to all. Those that do not answer get them when they do. tidy: versions beside it go.

        Raises:
            UserError: a server takes no weights, or has nothing for some parameter.
        """
        with self._changing:
            self.model, self._handed_out = str(folder), True
            self.known = self.written = version
            with ThreadPoolExecutor(len(self.clients)) as pool:
                list(pool.map(self._bring_up_to_date, self.clients))
            if tidy:
                self._tidy(folder.parent)

    def _tidy(self, weights: Path) -> None:
        """Older versions go, but for those that a server is being started with."""
        needed = {self.model, *self._starting_with.values()}
        for folder in weights.glob("version-*"):
            if str(folder) not in needed:
                shutil.rmtree(folder, ignore_errors=True)

    def hand_out_by(self, send: Callable[[], dict[Client, list[str]]], version: int) -> None:
        """By broadcast, to all; `send` returns what each has nothing for."""
        with self._changing:
            for client, names in send().items():
                refuse_missing(client, names)
            self.known = version

    def _bring_up_to_date(self, client: Client) -> None:
        server = self._server_of(client)
        if server is not None and server.number in self._starting:
            self.counts.add("rollout/updates_missed")
            return
        self._loading.add(client)
        try:
            missing = client.update(self.model, self.written, self.config.server_wait_s, self.config.probe_s)
        except Unreachable:
            self.counts.add("rollout/updates_missed")
            if server is not None:
                server.kill()  # it may have a part of them
            return
        except Refused as error:
            raise UserError(f"rollout: a server does not take weights: {error}") from error
        finally:
            self._heard[client] = time.monotonic()
            self._loading.discard(client)
        refuse_missing(client, missing)

    def _server_of(self, client: Client) -> Server | None:
        return next((server for server in self.own if server.client is client), None)

    # --- lives -----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """What goes wrong here ends the run, for nobody would look after the servers any more."""
        try:
            while not self._closing.wait(1.0) and not self.fatal:
                for server in self.own:
                    if self._closing.is_set():
                        return
                    if server.number in self._starting:
                        self._look_after_start(server)
                    elif not (server.alive and self._answers(server.client)):
                        self._start_again(server)
                if not self.own:
                    for client in self.clients:
                        self._look_at(client)
        except Exception as error:
            self.fatal = str(error) or type(error).__name__

    def _start_again(self, server: Server) -> None:
        self.counts.add("rollout/server_restarts")
        how = f"hangs (no word within {self.config.probe_s:g} s)" if server.alive else "has died"
        say(f"rollout: server {server.number} {how}; it is started again")
        self._start(server)

    def _start(self, server: Server) -> None:
        server.kill()
        self._deaths[server.number] += 1
        if self._deaths[server.number] > DEATHS:
            self.fatal = f"server {server.number} ended {DEATHS} times: {server.last_error()}"
            return
        with self._changing:
            self._starting[server.number], self._starting_with[server.number] = self.written, self.model
            server.start(self.model)

    def _look_after_start(self, server: Server) -> None:
        if not server.alive or time.monotonic() - server.started > START_S:
            say(f"rollout: server {server.number} did not start: {server.last_error()}; see {server.log}")
            self._start(server)
            return
        if not server.client.ready():
            return
        with self._changing:
            began_with = self._starting.pop(server.number)
            del self._starting_with[server.number]
            self._heard[server.client] = time.monotonic()
            self._deaths[server.number] = 0
            if began_with != self.written:
                self._bring_up_to_date(server.client)
                return
            with suppress(Unreachable):  # it has died again, which is seen in a second
                server.client.set_version(began_with)

    def _answers(self, client: Client) -> bool:
        """Asks its engine now and then: a server may be alive and hang. Between two steps of decoding an engine
        answers, however many requests it has."""
        if client in self._loading or time.monotonic() - self._heard[client] < self.config.probe_s / 2:
            return True  # what loads weights has a limit of its own
        self._heard[client] = time.monotonic()
        try:
            client.version(self.config.probe_s)
        except Unreachable:
            return client in self._loading
        return True

    def _look_at(self, client: Client) -> None:
        """A server of others: asked nothing while it is silent; one that was started again gets the newest weights."""
        try:
            version = client.version(self.config.probe_s)
            if self._leads and self._handed_out and version not in (self.known, self.written):
                with self._changing:
                    if client.version() not in (self.known, self.written):
                        self._bring_up_to_date(client)
        except Unreachable:
            client.away = client not in self._loading
            return
        client.away = False

    def close(self) -> None:
        self._closing.set()
        for server in self.own:
            server.kill()
        if self._watcher.is_alive():
            self._watcher.join(timeout=10)
        for server in self.own:  # the watcher may have been starting one
            server.kill()
        for client in self.clients:
            client.close()


def refuse_missing(client: Client, missing: list[str]) -> None:
    """Raises UserError where a server has parameters, `missing`, that it was not given."""
    if missing:
        raise UserError(f"rollout: {client.url} has nothing for {missing[0]} ({len(missing)} parameters) after a sync")
