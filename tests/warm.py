"""Processes that begin with the heavy imports done: forked from one that has done them, and nothing else.

torch and transformers cost a command seconds, many times what most tests are about. What such a process is not: it
takes its hash seed, and what libraries read of the environment as they are imported, from the one that it is forked
from, and ends without the interpreter's own clean-up. `tiny.luffy(fresh=True)` is for tests that are about those.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

HEAVY = ["torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "transformers.modeling_utils", "peft"]
READ_AT_IMPORT = (
    "CUDA",
    "HF_",
    "HOME",
    "KMP_",
    "LD_",
    "MKL_",
    "OMP_",
    "PYTHON",
    "TOKENIZERS_",
    "TORCH_",
    "TRANSFORMERS_",
    "TRITON_INTERPRET",
    "XDG_",
)
AT_START = dict(os.environ)


def serves(env: Mapping[str, str]) -> bool:
    """Whether a command of this environment would import libraries as they were imported."""
    there = _start()
    names = (name for name in env.keys() | AT_START.keys() if name.startswith(READ_AT_IMPORT))
    return all(env.get(name, None if name in AT_START else there.get(name)) == there.get(name) for name in names)


def luffy(args: list[str], cwd: Path, env: Mapping[str, str], timeout: int) -> subprocess.CompletedProcess[str]:
    """What `python -m luffy ARGS` does and says. env: one that `serves`."""
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        for path in said:
            path.touch()
        process = multiprocessing.get_context("forkserver").Process(target=_run, args=(args, cwd, dict(env), said))
        process.start()
        try:
            process.join(timeout)
            if process.is_alive():
                raise subprocess.TimeoutExpired(["luffy", *args], timeout, *(path.read_bytes() for path in said))
        finally:
            process.kill()
            process.join()
        return subprocess.CompletedProcess(["luffy", *args], process.exitcode, *(path.read_text() for path in said))


@cache
def _start() -> dict[str, str]:
    """The environment of the first process: pytest's when it began, and what commands set before they import."""
    from luffy.console import QUIET
    from luffy.process import before_torch

    now = dict(os.environ)
    try:
        _become(QUIET | AT_START)
        before_torch()
        multiprocessing.get_context("forkserver").set_forkserver_preload(HEAVY)
        forkserver.ensure_running()
        return dict(os.environ)
    finally:
        _become(now)


def _become(env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)


def _run(args: list[str], cwd: Path, env: dict[str, str], said: list[Path]) -> None:
    multiprocessing.set_start_method(None, force=True)
    os.chdir(cwd)
    _become(env)
    for number, path in enumerate(said, 1):
        file = os.open(path, os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
    here = str(Path(__file__).parent)
    sys.path[:] = [str(cwd), *(place for place in sys.path if place != here)]
    sys.argv = ["luffy", *args]
    try:
        runpy.run_module("luffy", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.exit(code)
