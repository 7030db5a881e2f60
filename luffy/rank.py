"""What a process that is one of many ranks knows about whoever started it: torchrun, our launcher, or a scheduler."""

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def become_rank() -> None:
    """At the start of a rank: end with the launcher, whatever ends it."""
    launcher = os.environ.get("LUFFY_LAUNCHER")
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it ended before the line above
        os._exit(1)


def restarted() -> bool:
    """Whether an elastic agent starts this rank after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def world_size() -> int:
    """Ranks of the job that this process is of."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def speaks() -> bool:
    """Whether this process is the one of the job that talks and writes the report."""
    return os.environ.get("RANK", "0") == "0"


def exit_code(stopped: KeyboardInterrupt) -> int:
    """Of a process that was interrupted, or has stopped as asked (`luffy.interrupt.Stopped`).

    Elastic agents take all but 0 for a failure, so a rank of our launcher leaves it a note instead.
    """
    code = getattr(stopped, "exit_code", None)
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if code is None or "LUFFY_LAUNCHER" not in os.environ or not error_file:
        return 130 if code is None else code
    Path(error_file).with_name("stopped").write_text(str(code))
    return 0


def round_of_ranks() -> str:
    """Differs between the starts of a job's ranks, whose store may still hold what earlier ones said."""
    return os.environ.get("LUFFY_ROUND") or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
