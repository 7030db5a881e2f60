"""The list of a checkpoint's files, written last: a checkpoint is whole if everything on its list is there.

That holds on any mount, also where a rename is no single act (a copy file by file, seen half done). Sizes are compared
whenever a checkpoint is looked for, checksums where one is resumed from.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from luffy.consolidate import Facts, facts
from luffy.errors import UserError
from luffy.files import write_json

MANIFEST = "trainer/manifest.json"
FORMAT = 1


def write_manifest(checkpoint: Path, files: Mapping[str, Facts], **about: Any) -> None:
    """`files`: path inside the checkpoint -> size and checksum. What it is `about` is anything that JSON holds."""
    write_json(checkpoint / MANIFEST, {"format": FORMAT, **about, "files": dict(sorted(files.items()))})


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: there is none, it is damaged, or a later version wrote it.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise UserError(
                f"checkpoint: {checkpoint.name} has format {manifest['format']!r}, expected {FORMAT}; "
                f"another version of luffy wrote it"
            )
        if not isinstance(manifest["files"], dict):
            raise TypeError("its files are no table")
        return manifest
    except FileNotFoundError as error:
        raise UserError(
            f"checkpoint: {checkpoint.name} has no {MANIFEST}: it was never finished, or an earlier version wrote it"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, OSError) as error:
        raise UserError(f"checkpoint: {checkpoint.name} has a damaged {MANIFEST} ({error!r})") from error


def damage(checkpoint: Path) -> str | None:
    """What keeps the checkpoint from being whole, as a sentence; None if every file is there with its size."""
    try:
        files = read_manifest(checkpoint)["files"]
    except UserError as error:
        return str(error)
    for name, expected in files.items():
        try:
            size = (checkpoint / name).stat().st_size
        except OSError:
            return f"checkpoint: {checkpoint.name} lacks {name}"
        if size != expected["bytes"]:
            return f"checkpoint: {checkpoint.name} is damaged: {name} has {size} bytes, expected {expected['bytes']}"
    return None


def verify(checkpoint: Path) -> None:
    """Read every file and compare its checksum; the ranks share the work. Collective over all ranks.

    Raises:
        UserError: on every rank, naming the first file that is not what was written.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    problem = damage(checkpoint) or _changed(checkpoint, rank, world)  # ranks may see different things, and all decide
    problems: list[str | None] = [problem]
    if world > 1:
        problems = [None] * world
        dist.all_gather_object(problems, problem)
    if found := [text for text in problems if text]:
        raise UserError(found[0])


def _changed(checkpoint: Path, rank: int, world: int) -> str | None:
    """The first of this rank's share of the files whose contents are not what was written."""
    for name, expected in list(read_manifest(checkpoint)["files"].items())[rank::world]:
        if not _same(checkpoint / name, expected):
            return (
                f"checkpoint: {checkpoint.name} is damaged: the contents of {name} are not what was written (same "
                f"size, other checksum)"
            )
    return None


def fingerprint(architecture: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What kind of model it is: its class, and a hash of parameter names and shapes."""
    listed = json.dumps([architecture, sorted((name, list(shape)) for name, shape in shapes.items())])
    return {"architecture": architecture, "fingerprint": hashlib.sha256(listed.encode()).hexdigest()}


def _same(path: Path, expected: Mapping[str, Any]) -> bool:
    try:
        return facts(path) == expected
    except OSError:
        return False
