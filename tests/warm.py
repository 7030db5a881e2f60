"""Processes that begin with the heavy imports done: forked from one that has done them, and nothing else.

torch and transformers cost a command seconds, many times what most tests are about. Deliberately absent: `luffy`
itself, which each process imports anew, so that it reads its own environment.
"""

import atexit
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path

from luffy.process import before_torch

HEAVY = ("torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "transformers.modeling_utils", "peft")


def luffy(args: list[str], cwd: Path, env: Mapping[str, str], timeout: int) -> subprocess.CompletedProcess[str]:
    """What `python -m luffy ARGS` does and says."""
    before_torch()  # the environment that imports read, as commands set it
    forks = get_context("forkserver")
    forks.set_forkserver_preload([*HEAVY])
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        process = forks.Process(target=_run, args=(args, cwd, dict(env), said))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["luffy", *args], timeout, *(path.read_bytes() for path in said))
        return subprocess.CompletedProcess(args, process.exitcode, *(path.read_text() for path in said))


def _run(args: list[str], cwd: Path, env: dict[str, str], said: list[Path]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv, sys.path[0] = ["luffy", *args], str(cwd)
    try:
        from luffy.cli import main

        code = main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.exit(code)
