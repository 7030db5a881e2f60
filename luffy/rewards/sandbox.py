"""Runs one Python file with little to lose: `python -I -S -B sandbox.py FILE SECONDS MEMORY_BYTES`.

Limits of time, memory, open files and file sizes; no processes of its own for an ordinary user; and where the kernel
lets a user have namespaces, no network and no signals to other processes. What the user may read it may read, files
and what /proc says of the user's processes alike. It dies with whoever started it. Imports nothing of this project: it
is run by path.
"""

import ctypes
import os
import resource
import runpy
import signal
import sys

NEWUSER, NEWPID, NEWNET, NEWIPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
PDEATHSIG = 1
FILE_BYTES = 16 << 20
OPEN_FILES = 64


def die_with_parent(libc: ctypes.CDLL) -> None:
    """Ask the kernel to kill this process when its parent ends."""
    libc.prctl(PDEATHSIG, signal.SIGKILL)


def limit(seconds: int, memory: int) -> None:
    """seconds: of a processor. memory: bytes of address space."""
    for what, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (value, value))


def main(file: str, seconds: str, memory: str) -> None:
    """Run the file, in namespaces of its own where that is allowed; what it exits with is what this exits with."""
    libc = ctypes.CDLL(None, use_errno=True)
    die_with_parent(libc)
    if libc.unshare(NEWUSER | NEWPID | NEWNET | NEWIPC) == 0:
        child = os.fork()  # only children are in the new namespace of processes, and die with the first of them
        if child:
            _, status = os.waitpid(child, 0)
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
        die_with_parent(libc)
    limit(int(seconds), int(memory))
    sys.argv = [file]
    runpy.run_path(file, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
