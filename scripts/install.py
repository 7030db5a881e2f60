"""Install the project and what it needs into the environment of the interpreter that runs this. Called by setup.sh.

Versions are read from pyproject.toml, the only place that pins them. What needs care is torch on a machine without an
NVIDIA GPU: plain PyPI serves several GB of CUDA there. So pip is asked, without downloading, what it would install; if
that is a CUDA build, PyTorch's own CPU index is tried; and what is installed in the end is checked.
Standard library only: it runs in an empty environment.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
LOG = Path(sys.prefix) / "luffy-setup.log"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
NOISE = "is ignored: it is neither a file nor a directory"
TORCH_PROBE = "import torch; print(torch.__version__, torch.version.cuda)"
# vLLM for CPU depends on these, no text model needs them, and PyPI's builds do not fit a CPU torch: importing such a
# one fails, and with it `import transformers`.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
COMPANION_PROBE = """
import importlib, importlib.util, sys
for name in sys.argv[1:]:
    if importlib.util.find_spec(name):
        print("has", name, flush=True)
        try:
            importlib.import_module(name)
        except Exception:
            continue
        print("works", name, flush=True)
"""


def die(sentence: str) -> NoReturn:
    sys.exit(f"luffy: {sentence}")


def say(line: str) -> None:
    print(f"luffy: {line}", flush=True)


def pip_install(what: str, *arguments: str) -> None:
    """Run `pip install`, its output in the log; on failure show the log's end and stop."""
    with LOG.open("a") as log:
        log.write(f"\n== {what}: pip install {' '.join(arguments)}\n")
        log.flush()
        command = [*PIP, "install", "--progress-bar", "off", *arguments]
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        lines = [line for line in LOG.read_text(errors="replace").splitlines() if NOISE not in line]
        print("\n".join(lines[-25:]), file=sys.stderr)
        die(f"could not install {what}; the whole output is in {LOG}.")


def would_install(pin: str, *arguments: str) -> dict[str, Any] | None:
    """The metadata of what pip would install for `pin`, found without downloading it; None if it finds nothing."""
    command = [*PIP, "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-", *arguments]
    done = subprocess.run([*command, pin], cwd=ROOT, capture_output=True, text=True)
    with LOG.open("a") as log:
        log.write(f"\n== dry run of {pin} {' '.join(arguments)}\n{done.stderr}")
    return json.loads(done.stdout)["install"][0]["metadata"] if done.returncode == 0 else None


def is_for_gpu(metadata: dict[str, Any]) -> bool:
    """Whether a torch wheel is a GPU build: its local version says so, or it demands NVIDIA's packages here."""
    if "+" in metadata["version"]:
        return metadata["version"].split("+")[1].startswith(("cu", "rocm", "xpu"))
    from pip._vendor.packaging.requirements import Requirement

    demands = [Requirement(text) for text in metadata.get("requires_dist", ())]
    here = [d for d in demands if d.marker is None or d.marker.evaluate({"extra": ""})]
    return any(re.match(r"nvidia-|cuda-", d.name) for d in here)


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False


def cpu_torch_arguments(pin: str) -> list[str]:
    """The pip arguments that bring a CPU build of torch; stops if there is none to be had."""
    found = would_install(pin)
    if found and not is_for_gpu(found):
        return []
    if reachable(f"{CPU_INDEX}/torch/"):
        arguments = ["--extra-index-url", CPU_INDEX]
        found = would_install(pin, *arguments)
        if found and not is_for_gpu(found):
            return arguments
    offer = f"offer only a CUDA build of {pin}" if found else f"do not offer {pin} (see {LOG})"
    die(f"this machine shows no NVIDIA GPU, and pip's indexes {offer}, and {CPU_INDEX} was no help.")


def installed_torch() -> tuple[str, str] | None:
    """Version and CUDA version ("None" in a CPU build) of the torch in this environment, or None."""
    done = subprocess.run([sys.executable, "-c", TORCH_PROBE], capture_output=True, text=True)
    version, _, cuda = done.stdout.strip().partition(" ")
    return (version, cuda) if done.returncode == 0 else None


def install_torch(pin: str, extra: str) -> list[str]:
    """Install the pinned torch, of the right kind; returns the pip arguments that later installs must repeat."""
    arguments = cpu_torch_arguments(pin) if extra == "cpu" else []
    have = installed_torch()
    if have is None or have[0].split("+")[0] != pin.partition("==")[2]:
        say(f"installing {pin} ({'CPU build' if extra == 'cpu' else 'CUDA build'})")
        pip_install(pin, *arguments, pin)
        have = installed_torch()
    if have is None:
        die(f"{pin} was installed but `import torch` fails: try {sys.executable} -c 'import torch'.")
    if extra == "cpu" and have[1] != "None":
        die(f"{sys.prefix} holds a CUDA build of torch but this machine shows no NVIDIA GPU: remove that folder.")
    lock = Path(sys.prefix) / "luffy-constraints.txt"
    lock.write_text(f"torch=={have[0]}\n")  # nothing that follows may swap it
    return [*arguments, "--constraint", str(lock)]


def remove_broken_companions(again: bool = True) -> None:
    """Uninstall those of torchvision, torchaudio and torchcodec that are installed and do not import."""
    command = [sys.executable, "-c", COMPANION_PROBE, *COMPANIONS]
    said = subprocess.run(command, capture_output=True, text=True, cwd=sys.prefix).stdout.splitlines()
    broken = [name for name in COMPANIONS if f"has {name}" in said and f"works {name}" not in said]
    if broken:
        say(f"removing {', '.join(broken)}: not usable with this torch, and not needed")
        with LOG.open("a") as log:
            subprocess.run([*PIP, "uninstall", "--yes", *broken], stdout=log, stderr=subprocess.STDOUT, check=True)
        if again:
            remove_broken_companions(again=False)  # one that leaned on another


def build_requirements(project: dict[str, Any]) -> list[str]:
    """What the build needs, without torch, which is there already."""
    return [r for r in project["build-system"]["requires"] if not re.match(r"torch\b", r)]


def main(extra: str, stage: str) -> None:
    """`extra` is cpu or cuda; `stage` is all, or project where the packages it needs are there already."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    if stage == "project":
        say("installing the project again, with its kernels")
        pip_install("luffy-rl", "--no-build-isolation", "--no-deps", "--editable", ".")
        return
    pins = project["project"]["optional-dependencies"][extra]
    say(f"setting up for {'an NVIDIA GPU' if extra == 'cuda' else 'CPU'}, some minutes the first time; log: {LOG}")
    LOG.write_text("")
    pip_install("a pip that reads a wheel's metadata without downloading it", "pip>=23.2")
    torch_pin = next(p for p in pins if re.match(r"torch\b", p))
    arguments = install_torch(torch_pin, extra)
    pip_install("the build tools", *arguments, *build_requirements(project))
    say("installing vLLM, transformers and the rest, and building the kernels")
    vllm = os.environ.get("LUFFY_VLLM")
    wanted = [f".[{extra},dev]"] if not vllm else [".[train,dev]", torch_pin, vllm]
    pip_install("luffy-rl", *arguments, "--no-build-isolation", "--editable", *wanted)
    if extra == "cpu":
        remove_broken_companions()
    say("set up")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
