"""What is done inside vLLM's worker, in this process or in a server's. With `vllm_engine.py` the only place that knows
vLLM's insides; written for 0.32.
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from luffy import versions


class Coverage:
    """Notes which of a model's parameters are loaded, from now on: vLLM says so in a log line alone."""

    def __init__(self, model: Any) -> None:
        self._model, self._loaded = model, set[str]()
        original = type(model).load_weights

        def load_weights(weights: Iterable[tuple[str, Tensor]]) -> Any:
            found = original(model, weights)
            self._loaded.update(found or ())
            return found

        model.load_weights = load_weights

    def close(self) -> list[str]:
        """Names of the parameters that nothing was loaded into."""
        del self._model.load_weights
        _repack_tied_head(self._model)
        return sorted({name for name, _ in self._model.named_parameters()} - self._loaded)


def load(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Load Hugging Face (name, tensor) pairs in place; vLLM fuses and shards what it is given. Returns the names of its
    own parameters that it has nothing for."""
    coverage = Coverage(worker.model_runner.get_model())
    try:
        worker.reload_weights(weights_iterator=weights)
    finally:
        missing = coverage.close()
    return missing


def _repack_tied_head(model: Any) -> None:
    """Make a tied head see the new embedding.

    On CPU vLLM 0.32 computes logits from a packed copy of the head's weight. A reload processes the embedding alone,
    so the copy would stay that of the old weights, silently. Drop this once a reload repacks tied heads.
    """
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


def read_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder's safetensors files, one at a time, in the order of their files' names."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                yield name, file.get_tensor(name)


def end_with_server(server: int) -> None:
    """End vLLM's engine and this worker of it when the server's process has ended: vLLM 0.32 leaves both behind, with
    the GPU's memory, where a server is killed. Linux."""
    parent, died = os.getppid(), os.pidfd_open(server)

    def wait() -> None:
        select.select([died], [], [])
        if parent != server and os.getppid() == parent:  # the engine is a process between the two
            os.kill(parent, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait, name="luffy-server", daemon=True).start()


def register() -> None:
    """Make --weight-transfer-config's backends `luffy-nccl` and `luffy-gloo` known to this process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as Factory

    for name, kind in (("luffy-nccl", "NcclReceiver"), ("luffy-gloo", "GlooReceiver")):
        if name not in Factory._registry:
            Factory.register_engine(name, "luffy.rollout.receiver", kind)


if _server := os.environ.get("LUFFY_SERVER_PID"):  # this process belongs to a server
    register()
    if int(_server) != os.getpid() and sys.platform == "linux":
        end_with_server(int(_server))


class WorkerExtension:
    """Methods that the worker of a server gains (`--worker-extension-cls`), called through /collective_rpc."""

    def luffy_load(self, folder: str) -> dict[str, list[str]]:
        return {"missing": load(self, read_folder(Path(folder)))}

    def luffy_group(self) -> dict[str, Any]:
        """The group that broadcasts weights to it, and what the last broadcast left out."""
        engine = self.weight_transfer_engine  # type: ignore[attr-defined]
        return {"group": getattr(engine, "name", None), "missing": getattr(engine, "missing", [])}

    def luffy_describe(self) -> dict[str, Any]:
        """What a trainer compares before it trusts a server."""
        config = self.model_runner.model_config  # type: ignore[attr-defined]
        sizes = {
            "vocabulary": config.get_vocab_size(),
            "hidden size": config.get_hidden_size(),
            "blocks": config.hf_text_config.num_hidden_layers,
        }
        return {"sizes": sizes, "positions": config.max_model_len, "versions": versions.of_rollouts()}
