"""Files that are either whole or absent."""

import contextlib
import errno
import json
import os
import re
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
        "ENOTCONN",  # a mount whose server went away
        "ESTALE",
    )
}

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TEMPORARY = re.compile(r"(^|/)\.([^/]+)\.tmp$")
"""As `temporary_name` makes them: a message has the name that was asked for."""


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn a file that cannot be read into one sentence. what: who reads."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{what}: there is no file {path}; mend the path") from error
    except IsADirectoryError as error:
        raise UserError(f"{what}: {path} is a folder, and a file is read; name one of its files") from error
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(f"{what}: {path} cannot be read ({error.strerror}); mend that, or name another") from error


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn a full disk, or a path that cannot be written, into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        file = _TEMPORARY.sub(r"\1\2", str(error.filename)) if error.filename else ""
        if file and error.errno == errno.ENOENT and not (folder := Path(file).parent).exists():
            said, remedy = f"there is no folder {folder}", "make it, or mend the path,"
        else:
            said = f"{error.strerror}: {file or 'while writing'}"
            remedy = "make room" if error.errno in FULL else "mend the path"
        raise UserError(f"{what}: {said}; nothing was replaced; {remedy} and try again") from error


def write_text(path: Path, text: str) -> None:
    """Write beside, flush, rename."""
    temporary = temporary_name(path)
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


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path`, flushed to the disk, if the block succeeds, and vanishes if it does not."""
    temporary = temporary_name(path)
    with disk_errors(f"cannot write {path.name}"):
        try:
            yield temporary
            _flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


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


def temporary_name(path: Path) -> Path:
    """What `path` is called until it is whole; in the same folder, so that a rename moves no data."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def new_folder(path: Path, flush: bool = True) -> Iterator[Path]:
    """A temporary folder that becomes `path` if the block succeeds, and vanishes if it does not. What no crash of the
    machine has to spare need not be flushed to the disk."""
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        put_in_place(temporary, path, flush)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def put_in_place(temporary: Path, path: Path, flush: bool = True) -> None:
    """Flush the folder `temporary` to the disk and rename it to `path`, which it replaces if there is one."""
    for folder, _, names in os.walk(temporary, topdown=False) if flush else ():
        for name in names:
            _flush(Path(folder, name))
        _flush(Path(folder))
    if path.exists():  # aside first: at every moment one of the two is whole
        aside = path.with_name(f".{path.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        path.replace(aside)
        temporary.replace(path)
        shutil.rmtree(aside)
    else:
        temporary.replace(path)
    if flush:
        _flush(path.parent)


def remove_folder(path: Path) -> None:
    """Under another name first: a kill half-way leaves nothing that could be taken for the folder."""
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    path.replace(temporary)
    shutil.rmtree(temporary)


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


def _flush(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        # some mounts know no fsync of folders
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)
