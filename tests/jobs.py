"""Jobs of rank_loop.py under the launcher, for tests, and what they leave behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STARTED: list[subprocess.Popen] = []
LOOP = str(ROOT / "tests" / "rank_loop.py")


def job(
    folder: Path, ranks: int, *arguments: str | int, env: dict[str, str] | None = None, **launch
) -> subprocess.Popen:
    """A launcher in a process of its own, and in a group of its own, as a shell would start it."""
    command = [LOOP, str(folder), *map(str, arguments)]
    code = f"""
import sys
from luffy.launch import Launch, start
sys.exit(start(Launch(ranks_per_node={ranks}, **{launch!r}), {command!r}))
"""
    folder.mkdir(exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=inherited | {"PYTHONPATH": str(ROOT)} | (env or {}),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    return watched(process)


def watched(process: subprocess.Popen) -> subprocess.Popen:
    """It leads a group of its own, which does not outlive the test."""
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    """A test that fails half-way leaves no launcher behind, and a launcher that is killed leaves no ranks."""
    yield
    for process in STARTED:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    STARTED.clear()


def end(process: subprocess.Popen, timeout: float = 60) -> str:
    """Its stderr, once it has ended; nothing it started may run then."""
    try:
        _, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return err


def wait_for(what, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps(folder: Path, rank: int = 0) -> list[int]:
    file = folder / f"steps-{rank}"
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def pids(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in sorted(folder.glob("pid-*"))]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def orphans(folder: Path) -> list[str]:
    """Command lines of processes that still have to do with `folder`."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in listed if str(folder) in line and "rank_loop" in line]
