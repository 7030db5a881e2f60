"""Memory of this host, or of the container that it is seen from: what a process may take before it is killed."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Memory(NamedTuple):
    """Bytes."""

    total: float
    available: float
    """Also what the kernel gives back when it is asked, such as its cache of files."""


def host_memory(root: Path = Path("/")) -> Memory:
    """The least of what the host has and what control groups, version 1 or 2, leave to this process."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    found = Memory(total, _numbers(root / "proc/meminfo").get("MemAvailable:", total / 1024) * 1024)
    for limit, used in _groups(root):
        left = limit - min(limit, max(0.0, used))  # used and cache are read at two moments
        found = Memory(min(found.total, limit), min(found.available, left))
    return found


def _groups(root: Path) -> Iterator[tuple[float, float]]:
    """(limit, used) of every control group that this process is in and that has a limit. Inside a container its own is
    the top one that it sees, whatever it is called outside."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, group = line.split(":", 2)
        if names and "memory" not in names.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if names else "")
        limit, used, cache = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if names
            else ("memory.max", "memory.current", "inactive_file")
        )
        inside = top / group.lstrip("/")
        for folder in (inside, *inside.parents):
            if not folder.is_relative_to(top):
                break
            if (most := _text(folder / limit).strip()).isdecimal():  # "max": none
                taken = float(_text(folder / used) or 0) - _numbers(folder / "memory.stat").get(cache, 0.0)
                yield float(most), taken


def _numbers(file: Path) -> dict[str, float]:
    return {words[0]: float(words[1]) for line in _text(file).splitlines() if len(words := line.split()) > 1}


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
