"""Device and driver, memory, disks and caches."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

from luffy.diagnosis.finding import Finding, guarded
from luffy.embedded import cache_dir
from luffy.host import host_memory

GIB = 2**30
QUICKSTART = 10
"""GiB that it takes on a CPU, with the copies for its last checkpoint (docs/planning.md)."""
LEAST_SHARED = 1.0
"""GiB of /dev/shm: NCCL and vLLM's processes talk through it; containers often have 64 MiB."""


def examine() -> list[Finding]:
    checks = {
        "device": device,
        "driver": driver,
        "memory": memory,
        "shared mem": shared_memory,
        "disk": disk,
        "luffy cache": lambda: cache("luffy cache", cache_dir(), "LUFFY_CACHE"),
        "model cache": lambda: cache("model cache", hub_folder(), "HF_HOME"),
    }
    return [guarded(name, check) for name, check in checks.items()]


def device() -> Finding:
    import torch

    from luffy.dtypes import resolve

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        each = [torch.cuda.get_device_properties(at) for at in range(count)]
        names = ", ".join(f"{one.name} ({one.total_memory / GIB:.0f} GiB)" for one in each)
        return Finding("device", f"{count} GPU: {names}; model.dtype auto is {resolve('auto')}")
    return Finding("device", f"CPU, {torch.get_num_threads()} threads; model.dtype auto is {resolve('auto')}")


def driver() -> Finding:
    import torch

    return driver_verdict(driver_version(), driver_cuda(), torch.version.cuda, torch.cuda.is_available())


def driver_verdict(version: str | None, serves: tuple[int, int] | None, built: str | None, usable: bool) -> Finding:
    """
    Args:
        version: of the driver, as nvidia-smi has it.
        serves: newest CUDA that the driver serves.
        built: CUDA that torch is built for; None: for none.
        usable: whether torch finds a GPU.
    """
    if version is None and serves is None:
        missing = "install NVIDIA's driver if there is a GPU; without one, torch for the CPU is smaller"
        return Finding("driver", "none of NVIDIA", "") if built is None else Finding("driver", "none", missing)
    said = f"{version or 'of unknown version'}" + (f", serves CUDA up to {serves[0]}.{serves[1]}" if serves else "")
    if built is None:
        return Finding("driver", said, "torch is built without CUDA: install the `cuda` extra to use the GPU")
    said += f"; torch is built for CUDA {built}"
    # a driver serves every CUDA of its major version, and older ones
    if serves and serves[0] < int(built.split(".")[0]):
        newer = f"the driver is too old for torch: install one for CUDA {built}, or a torch for CUDA {serves[0]}"
        return Finding("driver", said, newer)
    hidden = "torch finds no GPU: look at CUDA_VISIBLE_DEVICES, and whether the container was given one"
    return Finding("driver", said, "" if usable else hidden)


def driver_version() -> str | None:
    if (command := shutil.which("nvidia-smi")) is None:
        return None
    try:
        asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


def driver_cuda() -> tuple[int, int] | None:
    """(major, minor) of the newest CUDA that the driver serves, as the driver itself says; None: there is none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)):
        return None
    return number.value // 1000, number.value % 1000 // 10


def memory() -> Finding:
    total, free = (value / GIB for value in host_memory())
    few = "" if free > QUICKSTART else f"the quickstart takes some {QUICKSTART} GiB; close something"
    return Finding("memory", f"{total:.0f} GiB, {free:.0f} available", few)


def shared_memory(folder: str = "/dev/shm") -> Finding:
    if not os.path.isdir(folder):
        return Finding("shared mem", "none")
    size = shutil.disk_usage(folder).total / GIB
    few = (
        "" if size >= LEAST_SHARED else "ranks and vLLM talk through it: give the container --ipc=host or --shm-size=8g"
    )
    return Finding("shared mem", f"{size:.1f} GiB (/dev/shm)", few)


def disk() -> Finding:
    free = shutil.disk_usage(".").free / GIB
    if not os.access(".", os.W_OK):
        return Finding("disk", "this folder cannot be written", "run folders go here: change to another folder")
    return Finding("disk", f"{free:.0f} GiB free here", "" if free > 5 else "checkpoints need more; free some")


def hub_folder() -> Path:
    """Where models from the Hub lie."""
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")


def cache(name: str, folder: Path, variable: str) -> Finding:
    """A folder that is filled on first use; variable: what chooses another."""
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free / GIB
    if not os.access(there, os.W_OK) or not there.is_dir():
        return Finding(name, "cannot be written", f"set {variable} to a folder that can")
    few = "" if free > 1 else f"models need more; free some, or set {variable} to a folder of another disk"
    return Finding(name, f"{free:.0f} GiB free", few)
