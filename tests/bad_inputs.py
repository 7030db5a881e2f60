"""What the walk over bad input (test_bad_input_walk.py) provokes errors in, and how it tells what was said from what
was lost."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import luffy, make_model

from luffy.cli import main
from luffy.config import RolloutConfig
from luffy.rollout.server import Server, free_port, options_of

STEPS = 4
CONTEXT = 256
"""Positions that the server has room for."""
TOGETHER_S = 15.0
"""In which the last rank ends after the first, on a machine that is busy."""
GOOD = "<think>\n1+1=2\n</think>\nIt is \\boxed{2}."
RARE = "\u00ed"
"""The model has no embedding for its last byte."""
RUN = {
    "model.dtype": "float32",
    "data.max_prompt_tokens": 100,
    "data.max_trace_tokens": 100,
    "rollout.max_tokens": 8,
    "objective.rows": 3,
    "objective.entropy_coef": 0.001,  # every row is live, whatever its reward
    "train.prompts_per_step": 2,
    "train.steps": STEPS,
    "optim.schedule": "constant",
    "optim.warmup_steps": 0,
    "eval.every": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 9,
    "log.to": "[]",  # they write what they like into a run that goes on, and have tests of their own
}
RECORDS = ("metrics.jsonl", "timeline.json", "config.toml", "curves.png", "result.json")
"""Of a run, which it goes on with."""


class Says(NamedTuple):
    """What the one sentence has to contain: what it is about, what would be right, what is there, what to do."""

    thing: str
    expected: str
    given: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Bad:
    """An entry of the list.

    provoke: given a `Home`, makes whatever is needed and returns what to call: its exit code is `code`.
    shows: what is said besides, where it is gone on. needs: properties of `Home` that are to be there before.
    leaves: folder in which new files may be, and records of a run may have changed. moves: (what of a path, to what).
    """

    error: str
    provoke: Callable[["Home"], Callable[[], Any]]
    says: Says | None = None
    shows: tuple[str, ...] = ()
    code: int | None = 2
    needs: tuple[str, ...] = ()
    leaves: str = ""
    moves: tuple[str, str] = ("", "")
    after: Callable[["Home"], None] = lambda home: None
    slow: bool = False

    def loses(self, before: dict[str, str], after: dict[str, str]) -> list[str]:
        """Files that are not as they were, and new ones where none may be."""
        lost = [
            name
            for name, checksum in before.items()
            if after.get(name.replace(*self.moves)) != checksum and not self._may_write(name, RECORDS)
        ]
        return lost + [name for name in after if name not in before and not self._may_write(name)]

    def _may_write(self, name: str, files: tuple[str, ...] = ()) -> bool:
        """The lock of a run folder is there before anything is known of the run."""
        mine = bool(self.leaves) and name.startswith(self.leaves)
        return Path(name).name == ".lock" or (mine and name.endswith(files or ("",)))


def trace_row(question: str, trace: str | None = GOOD, number: int = 0, **more: Any) -> dict[str, Any]:
    """A row in LUFFY's schema."""
    return {
        "data_source": "mine",
        "prompt": [{"content": question, "role": "user"}],
        "target": [{"content": trace, "role": "assistant"}] if trace else [],
        "ability": "math",
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {"index": number, "split": "train"},
    } | more


TRACES = {
    "good": GOOD,
    "twice": GOOD + "<think>",
    "unclosed": "<think>\n1+1=2, so \\boxed{2}",
    "outside": f"{RARE} \\boxed{{2}}",
    "long": "x" * 200 + "\\boxed{2}",
    "mute": "I do not know.",
}


class Home:
    """A folder with a model, data, and, once they are asked for, a server of the model and a run on it."""

    def __init__(self, path: Path, patched: pytest.MonkeyPatch) -> None:
        self.path, self._patched = path, patched
        self.model = make_narrow_model(path / "model")
        asked = [(f"{kind} {n}: what is 1+1?", trace) for kind, trace in TRACES.items() for n in range(2)]
        asked.append(("long " * 30 + "what is 1+1?", GOOD))
        self.data = self.parquet("mine.parquet", [trace_row(*one, number) for number, one in enumerate(asked)])
        self.asked = self.jsonl("asked.jsonl", [{"prompt": "1+1?", "answer": "2"}])

    def parquet(self, name: str, rows: list[dict[str, Any]], **options: Any) -> Path:
        pq.write_table(pa.Table.from_pylist(rows), self.path / name, **options)
        return self.path / name

    def jsonl(self, name: str, rows: list[dict[str, Any]]) -> Path:
        (self.path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self.path / name

    def cli(self, *args: str | Path) -> Callable[[], int]:
        """The command in this process: what has been imported need not be again."""
        return lambda: main([str(arg) for arg in args])

    def process(self, *args: str | Path, **env: str) -> Callable[[], CompletedProcess[str]]:
        return lambda: luffy(*args, cwd=self.path, **env)

    def arguments(self, *more: str | Path, run: str = "new", **options: Any) -> list[str | Path]:
        flat = {"model.name": self.model, "data.path": self.data} | RUN
        flat |= {key.replace("__", "."): value for key, value in options.items()}
        flags = [f"--{key}={value}" for key, value in flat.items() if value is not None]
        return ["train", "quickstart", "--run-dir", self.path / "runs" / run, *more, *flags]

    def train(self, *more: str | Path, run: str = "new", **options: Any) -> Callable[[], int]:
        return self.cli(*self.arguments(*more, run=run, **options))

    def again(self, *more: str, run: str, **options: Any) -> Callable[[], int]:
        """Training from what the run has sampled, without an engine."""
        rollouts = self.path / "runs" / "whole" / "rollouts"
        return self.train(*more, run=run, rollout__engine="replay", rollout__replay=rollouts, **options)

    @cached_property
    def server(self) -> Server:
        config = RolloutConfig(engine="server", kv_cache_gib=0.25, max_sequences=16)
        options = options_of(config, dtype="float32", max_model_len=CONTEXT, trust_remote_code=False)
        made = Server(0, options, config, self.path / "server.log")
        made.start(str(self.model))
        made.wait_ready()
        self._patched.setenv("LUFFY_API_KEY", made.key)
        return made

    @property
    def url(self) -> str:
        return self.server.client.url

    @cached_property
    def run(self) -> Path:
        """A complete run, its rollouts recorded; what it said is beside."""
        served = {"rollout__engine": "server", "rollout__urls": json.dumps([self.url]), "rollout__record": "true"}
        done = luffy(*self.arguments(run="whole", **served), cwd=self.path)
        assert done.returncode == 0, done.stderr[-3000:]
        (self.path / "whole.out").write_text(done.stdout + done.stderr)
        return self.path / "runs" / "whole"

    def copy_of_run(self, name: str, last: int = STEPS) -> Path:
        """The run as it was after step `last`."""
        copy = self.path / "runs" / name
        shutil.copytree(self.run, copy)
        (copy / "result.json").unlink()
        for step in range(last + 1, STEPS + 1):
            shutil.rmtree(copy / "checkpoints" / f"step-{step:06d}")
            (copy / "tokens" / f"step-{step:06d}.parquet").unlink(missing_ok=True)
        return copy

    def close(self) -> None:
        if "server" in self.__dict__:
            self.server.close()


def make_narrow_model(folder: Path, **sizes: int) -> Path:
    """A tiny model with an embedding too few; of other sizes where they are given."""
    make_model(folder)
    return resize(folder, **{"vocab_size": 258} | sizes)


def resize(folder: Path, **sizes: int) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    for name, size in sizes.items():
        setattr(config, name, size)
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    return folder


def snapshot(folder: Path) -> dict[str, str]:
    """Checksum of every file, by its path; what a server says goes on."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "server.log"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def processes(home: Path) -> set[int]:
    """That this one has started, or that have to do with the folder; of those that have ended its own children that
    it has not waited for. multiprocessing keeps one to itself."""
    mine = {child.pid for child in psutil.Process().children(recursive=True)}
    found = set()
    for process in psutil.process_iter(["pid", "ppid", "cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or ())
        theirs = process.pid in mine or str(home) in command
        ended = process.info["status"] == psutil.STATUS_ZOMBIE and process.info["ppid"] != os.getpid()
        if theirs and not ended and "resource_tracker" not in command:
            found.add(process.pid)
    return found


def check_sentence(sentence: str, says: NamedTuple) -> None:
    """That each part is there, in a place of its own: words that another part contains would say nothing."""
    assert "\n" not in sentence
    taken: dict[int, str] = {}
    for part, words in says._asdict().items():
        assert words in sentence, f"{part} is not in: {sentence}"
        begin = sentence.index(words)
        places = range(begin, begin + len(words))
        shared = {taken[place] for place in places if place in taken}
        assert not shared, f"{part} is within {shared} of: {sentence}"
        taken |= dict.fromkeys(places, part)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Real write errors, in the middle of a file, of this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


DISK = """
mount -t tmpfs tmpfs "$1" && cp -a "$1.before/." "$1" && used=$(df -k --output=used "$1" | tail -1) &&
mount -o remount,size=$((used + $2))k "$1" && echo mounted && read _
"""


@contextmanager
def small_disk(folder: Path, room: int) -> Iterator[tuple[str, ...]]:
    """A real disk at `folder` with what is in it, and KiB of room; it is there for commands that begin with what is
    given. Afterwards `folder` is as the disk was left."""
    if os.geteuid() != 0 or not shutil.which("nsenter"):
        pytest.skip("a small disk needs root and util-linux")
    before = folder.with_name(f"{folder.name}.before")
    folder.rename(before)
    folder.mkdir()
    holder = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", DISK, "sh", folder, str(room)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin
    assert holder.stdout
    try:
        if holder.stdout.readline() != b"mounted\n":
            pytest.skip("a small disk needs a root that may mount one")
        yield "nsenter", "--mount", "--target", str(holder.pid), "--"
        shutil.copytree(f"/proc/{holder.pid}/root{folder}", folder, dirs_exist_ok=True)
    finally:
        shutil.rmtree(before)
        holder.communicate(b"\n", timeout=60)


def all_ranks(count: int, *args: str | Path, cwd: Path, within: tuple[str, ...] = ()) -> CompletedProcess[str]:
    """The command as torchrun starts it, each rank a child of this process, whose exit code is seen: it is the same of
    all, and no rank outlives another for long. Of what they said that with the sentence comes last."""
    command = [*within, sys.executable, "-m", "luffy", *map(str, args)]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    ends: list[float] = []
    with ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)]
        ranks = [
            psutil.Popen(
                command,
                cwd=cwd,
                env=os.environ | job | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=said[rank],
            )
            for rank in range(count)
        ]
        try:
            psutil.wait_procs(ranks, timeout=240, callback=lambda _: ends.append(time.monotonic()))
        finally:
            for rank in ranks:
                with suppress(psutil.NoSuchProcess):
                    rank.kill()
                rank.wait()
        for file in said:
            file.seek(0)
        codes, errors = [rank.returncode for rank in ranks], [file.read() for file in said]
    assert len(set(codes)) == 1, (codes, errors)
    assert ends[-1] - ends[0] < TOGETHER_S, (ends, errors)
    return CompletedProcess(command, codes[0], "", "".join(sorted(errors, key=lambda said: "\nluffy: " in f"\n{said}")))
