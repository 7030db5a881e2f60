"""Settings of the process that decide how fast a CPU trains. Measured in docs/cpu-training.md.

`before_torch` must run before torch is imported: OpenMP reads its environment once.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def before_torch() -> None:
    """Threads that wait at a barrier sleep instead of spinning.

    Decoding one token crosses hundreds of barriers. On a machine that does anything else, a spinning thread holds the
    core that its sibling needs in order to arrive.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def prepare_libraries() -> None:
    """Before a command imports torch: `before_torch`, and libraries that say nothing but errors."""
    before_torch()
    from luffy.console import quiet_libraries

    quiet_libraries()


def keep_freed_memory() -> None:
    """Let the process keep freed memory: a no-op where the C library is not glibc.

    Training frees and allocates the same large activations thousands of times. glibc returns such blocks to the kernel
    and page-faults them in again, which costs more than the arithmetic of small layers.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)  # large blocks from the heap too: glibc refuses a mmap threshold above 32 MiB
    mallopt(M_ARENA_MAX, 1)  # only the main arena can hold them
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
