"""Files that are either whole or absent."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luffy.errors import UserError

DISK_ERRORS = {
    getattr(errno, name)
    for name in (
        "ENOSPC",
        "EDQUOT",
        "EROFS",
        "EACCES",
        "EPERM",
        "EFBIG",
        "EIO",
        "ENOENT",
        "ENOTDIR",
        "EISDIR",
        "EEXIST",
    )
}


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn a full disk, or a path that cannot be written, into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise UserError(
                f"{what}: {error.strerror}: {error.filename or 'while writing'}; nothing was replaced"
            ) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write beside, flush, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(f"cannot write {path.name}"):
        try:
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a file of ours; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` if the block succeeds, and vanishes if it does not."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():  # aside first: at every moment one of the two is whole
            aside = path.with_name(f".{path.name}.old")
            shutil.rmtree(aside, ignore_errors=True)
            path.replace(aside)
            temporary.replace(path)
            shutil.rmtree(aside)
        else:
            temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sweep(parent: Path, names: str) -> None:
    """Tidy up what a kill inside `new_folder` left of the folders `names` (a glob) in `parent`.

    Half-written ones go; one that was set aside and not replaced comes back.
    """
    for aside in parent.glob(f".{names}.old"):
        path = aside.with_name(aside.name.removeprefix(".").removesuffix(".old"))
        if path.exists():
            shutil.rmtree(aside)
        else:
            aside.replace(path)
    for temporary in parent.glob(f".{names}.tmp"):
        shutil.rmtree(temporary)
