"""What a measurement depends on: the device, its clocks, versions of what is compared; and what its file is called."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from luffy_kernels import status

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CLOCKS = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
PROPERTIES = ("major", "minor", "total_memory", "multi_processor_count", "L2_cache_size")  # nothing that names one card
Record = dict[str, Any]


def environment() -> Record:
    """What a figure depends on, as far as it can be asked for without a further package."""
    properties = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    packages = ("triton", "liger-kernel", "cut-cross-entropy", "verl", "quack-kernels", "trl")
    return {
        "properties": {name: getattr(properties, name, None) for name in PROPERTIES} if properties else None,
        "nvidia-smi": said("nvidia-smi", "--query-gpu=" + CLOCKS, "--format=csv"),
        "rocm-smi": said("rocm-smi", "--showdriverversion", "--showclocks", "--showpower"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "packages": {name: version for name in packages if (version := _version(name))},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": said("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def machine() -> Record:
    """`environment` of a measurement on the CPU, with the CPU."""
    from luffy.run_folder import cpu_name  # late: a check on a GPU does without the trainer's packages

    about = {"cpu": cpu_name(), "isa": instruction_sets(), "threads": torch.get_num_threads(), "backends": status()}
    return about | {k: v for k, v in environment().items() if v not in (None, {})}


def instruction_sets() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags]


def file_name(kind: str, device: str, ending: str) -> str:
    """KIND-DEVICE.ENDING, the device's name in letters and digits."""
    return f"{kind}-{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-')}.{ending}"


def said(*command: str) -> str | None:
    """What a program prints; None where it does not exist or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
