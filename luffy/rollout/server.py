"""A vLLM server that this process has started: its command, its life, its last words."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from luffy.config import RolloutConfig
from luffy.errors import UserError
from luffy.rollout.client import Client
from luffy.rollout.explain import explain

START_S = 900.0  # until it answers: a large model is read from a disk


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


class Server:
    """number: among this run's servers. options: of vLLM's server, without model and port. Dies with this process."""

    def __init__(self, number: int, options: list[str], config: RolloutConfig, log: Path) -> None:
        self.number, self.log = number, log
        self._options = options
        self._devices = config.devices[number] if config.devices else None
        self.port, self._key = free_port(), secrets.token_urlsafe(24)
        self.client = Client(f"http://127.0.0.1:{self.port}", self._key, config.max_sequences)
        self._process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self._log_begins = 0  # what an earlier start has left

    @property
    def key(self) -> str:
        """For the other ranks of this run; it leaves neither the run's processes nor memory."""
        return self._key

    def start(self, model: str) -> None:
        command = [sys.executable, "-m", "luffy.rollout.serve", "--model", model, "--port", str(self.port)]
        environment = os.environ | {"VLLM_API_KEY": self._key, "LUFFY_SERVER_OF": str(os.getpid())}
        for name in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "MASTER_ADDR",
            "MASTER_PORT",
            "VLLM_ENABLE_V1_MULTIPROCESSING",
        ):
            environment.pop(name, None)
        if self._devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_begins = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._options], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.started = time.monotonic()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def wait_ready(self) -> None:
        """
        Raises:
            UserError: it ended, with its last error, or does not answer in time.
        """
        while not self.client.ready():
            if not self.alive:
                raise UserError(f"rollout: server {self.number} did not start: {self.last_error()}; see {self.log}")
            if time.monotonic() - self.started > START_S:
                raise UserError(f"rollout: server {self.number} does not answer after {START_S:.0f} s; see {self.log}")
            time.sleep(0.2)

    def last_error(self) -> str:
        """The reason in its log."""
        return explain(self.log.read_text(errors="replace")[self._log_begins :] if self.log.exists() else "")

    def kill(self) -> None:
        """It and every process of its own, now; the engine's follow by themselves (`luffy.rollout.worker`)."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        self.kill()
        self.client.close()


def options_of(config: RolloutConfig, *, dtype: str, max_model_len: int, trust_remote_code: bool) -> list[str]:
    """What `luffy.rollout.vllm_engine` gives vLLM in this process, as options of its server."""
    from luffy.rollout.vllm_engine import kv_cache_bytes

    options = ["--dtype", dtype, "--max-model-len", str(max_model_len)]
    options += ["--max-num-seqs", str(config.max_sequences), "--tensor-parallel-size", str(config.tensor_parallel)]
    options += ["--gpu-memory-utilization", str(config.memory_fraction)]
    if (cache := kv_cache_bytes(config)) is not None:
        options += ["--kv-cache-memory-bytes", str(cache)]
    if config.transport == "broadcast":
        backend = "luffy-nccl" if torch.cuda.is_available() else "luffy-gloo"
        options += ["--weight-transfer-config", json.dumps({"backend": backend})]
    options += ["--enforce-eager"] if config.eager else []
    # vLLM 0.32 rewinds a seeded generator after a partial prefill, which CPU generators cannot do
    options += [] if torch.cuda.is_available() else ["--no-enable-chunked-prefill"]
    return options + (["--trust-remote-code"] if trust_remote_code else [])
