"""Keep freed memory in the process.

Training on CPU frees and allocates the same large activations thousands of times. glibc returns such blocks to the
kernel and page-faults them in again, which costs more than the arithmetic of small layers. See docs/cpu-training.md.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP_BYTES = 2**31 - 1


def keep_freed_memory() -> None:
    """Raise glibc's mmap and trim thresholds as far as they go. A no-op where the C library is another."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, KEEP_BYTES)
    mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
