"""`luffy doctor`: what this machine has, what is missing for training on it, and what we could not run ourselves."""

import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from luffy.diagnosis import hardware, software
from luffy.diagnosis.finding import Finding
from luffy.errors import first_line

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
_QUOTED = re.compile(r"""(['"`])(?:file://)?~?/[^'"`\n]+\1""")
"""A path in quotes, blanks and all."""
_STEP = r"/(?:[\w.@+-]|\\ | (?=[\w.@+-]+/))+"
_PATH = re.compile(rf"(?:file://|(?<![\w.:/])|(?<=[^\s/]:)(?=[/~][^/]))(?!/dev/shm)~?(?:{_STEP})+/?")
"""Outside quotes, with blanks where another slash follows, also behind the colon of a list of paths, but not what
follows a server in an address."""


def examine() -> list[Finding]:
    return [*software.examine(), *hardware.examine()]


def kernels() -> str:
    """What serves the LM head, as luffy_kernels says where it can be imported."""
    try:
        import luffy_kernels

        return luffy_kernels.status()
    except Exception as error:  # a torch that does not load, of which a finding tells more
        return f"unknown: {first_line(error)}"


def print_findings(findings: list[Finding]) -> None:
    for finding in findings:
        print(f"{'!' if finding.lacks else ' '} {finding.name:12} {finding.found}")
        if finding.lacks:
            print(f"  {'':12} {finding.lacks}")
    print(f"\nKernels of the LM head, by operator and backend:\n{kernels()}")
    print("\nNever run by us, for want of GPUs (scripts/gpu_check.sh tries them; results are welcome):")
    for what, tried in UNVERIFIED:
        print(f"  {what}: {tried}")


def record(findings: list[Finding]) -> dict[str, Any]:
    """As JSON values."""
    from luffy.run_folder import environment

    return {
        "well": not any(finding.lacks for finding in findings),
        "findings": [asdict(finding) for finding in findings],
        "kernels": kernels().splitlines(),
        "never_run": [{"what": what, "tried": tried} for what, tried in UNVERIFIED],
        "environment": environment(),
    }


def print_report(findings: list[Finding], names: Iterable[str]) -> None:
    """The same as Markdown for a bug report: versions and sizes, no paths, no name of a user or of the machine.

    names: of the variables that are set, no value of one.
    """
    import json

    from luffy.run_folder import environment

    lines = ["```", *(f"{finding.name}: {finding.found}" for finding in findings)]
    lines += [f"! {finding.name}: {finding.lacks}" for finding in findings if finding.lacks]
    lines += ["", kernels(), "", json.dumps(environment())]
    lines += [
        "set: " + (", ".join(sorted(name for name in names if name.startswith(RELEVANT))) or "nothing"),
        "```",
    ]
    print(without_paths("\n".join(lines)))


def without_paths(text: str) -> str:
    return _PATH.sub("PATH", _QUOTED.sub("PATH", text.replace(str(Path.home()), "~")))
