"""The kernels as Hugging Face's `kernels` package loads them: python scripts/hub_layout.py FOLDER --license ID

    FOLDER/build.toml, torch-ext/luffy_kernels/     what kernel-builder starts from
    FOLDER/build/torch-{cpu,cuda,rocm}/             what it would make of it, ready to load or to upload
    from kernels import get_local_kernel
    ops = get_local_kernel(Path("FOLDER"))          # ops.linear_logprobs(hidden, weight, targets)

Python and Triton alone, for all of torch's versions: on a CPU the operators run in torch, since the compiled library is
part of the wheel and not of this. A copy has operators of its own names and may be loaded beside the installed package.
Standard library only. An existing FOLDER/build and torch-ext are replaced.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "kernels" / "luffy_kernels"
BACKENDS = ("cpu", "cuda", "rocm")
NAME = "luffy-kernels"


def files() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*") if path.suffix in (".py", ".json") and path.is_file())


def digest() -> str:
    """Of all sources: another one whenever something changes, as a loaded kernel's name must be."""
    found = hashlib.sha256()
    for path in files():
        found.update(str(path.relative_to(SOURCE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def copy_to(folder: Path) -> None:
    for path in files():
        target = folder / path.relative_to(SOURCE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def build_toml(version: int, licence: str) -> str:
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    general = f'name = "{NAME}"\nversion = {version}\nedition = 5\nlicense = "{licence}"\nbackends = [{backends}]\n'
    return f'[general]\n{general}\n[torch-noarch]\npyext = ["py", "json"]\n'


def metadata(backend: str, version: int, licence: str) -> dict:
    return {
        "id": f"_{NAME.replace('-', '_')}_{backend}_{digest()}",
        "name": NAME,
        "version": version,
        "license": licence,
        "python-depends": [],
        "backend": {"type": backend},
    }


def write(out: Path, version: int, licence: str) -> None:
    """Made beside `out`, then moved in."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        made = Path(folder)
        copy_to(made / "torch-ext" / SOURCE.name)
        for backend in BACKENDS:
            variant = made / "build" / f"torch-{backend}"
            copy_to(variant)
            (variant / "metadata.json").write_text(json.dumps(metadata(backend, version, licence), indent=2) + "\n")
        (out / "build.toml").write_text(build_toml(version, licence))
        for name in ("torch-ext", "build"):
            shutil.rmtree(out / name, ignore_errors=True)
            (made / name).rename(out / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--license", required=True, help="the Hub's name of the licence under which you publish it")
    parser.add_argument("--version", type=int, default=1, help="of the kernel on the Hub (default: %(default)s)")
    args = parser.parse_args()
    if not re.fullmatch(r"[A-Za-z0-9.+-]+", args.license):
        parser.error(f"--license must be a name such as apache-2.0, got {args.license!r}")
    if args.folder.resolve() in (SOURCE, *SOURCE.parents):
        parser.error(f"{args.folder} holds the sources; choose another folder")
    marker = args.folder / "build.toml"
    ours = marker.exists() and f'name = "{NAME}"' in marker.read_text()
    if not ours and any((args.folder / name).exists() for name in ("build", "torch-ext")):
        parser.error(f"{args.folder} has a build or torch-ext that is none of these kernels'; choose another folder")
    write(args.folder, args.version, args.license)
    print(f"{args.folder}: torch-{', torch-'.join(BACKENDS)} of {len(files())} files, {digest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
