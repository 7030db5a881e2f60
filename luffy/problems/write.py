"""Write a spec's splits as parquet files in LUFFY's training schema, once.

A manifest beside the files holds the spec's fingerprint and each file's digest. It is written last, so a run that was
cut short is redone and a finished one is left alone.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from luffy.problems.spec import GENERATOR_VERSION, SPLITS, ProblemSpec, rows

MANIFEST = "manifest.json"


def schema() -> Any:
    """The pyarrow schema of the files: LUFFY's columns, with more fields in `extra_info`."""
    import pyarrow as pa

    turns = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
    extra = [("index", pa.int64()), ("split", pa.string()), ("family", pa.string()), ("difficulty", pa.int64())]
    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", turns),
            ("target", turns),
            ("target_lst", pa.list_(pa.string())),
            ("target_teachers", pa.list_(pa.string())),
            ("ability", pa.string()),
            ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
            ("extra_info", pa.struct([*extra, ("teacher", pa.string()), ("wrong", pa.bool_())])),
        ]
    )


def write_splits(spec: ProblemSpec, directory: str | Path) -> dict[str, Path]:
    """Write every split with a count above 0 to `directory/<split>.parquet`; returns split -> path.

    Nothing is redone when the manifest matches the spec and the files match the manifest. Each file appears whole or
    not at all. Raises OSError when the folder cannot be written.
    """
    folder = Path(directory)
    paths = {split: folder / f"{split}.parquet" for split in SPLITS if getattr(spec, split)}
    if _is_written(spec, folder, paths):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    # The manifest goes first and a split that is no longer asked for goes too: nothing stale is ever read as new.
    for name in (MANIFEST, *(f"{split}.parquet" for split in SPLITS if split not in paths)):
        (folder / name).unlink(missing_ok=True)
    for split, path in paths.items():
        _write_parquet(spec, split, path)
    manifest = {
        "generator_version": GENERATOR_VERSION,
        "fingerprint": spec.fingerprint(),
        "spec": spec.canonical(),
        "files": {split: _digest(path) for split, path in paths.items()},
    }
    temporary = _temporary(folder / MANIFEST)
    temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(temporary, folder / MANIFEST)
    return paths


def _write_parquet(spec: ProblemSpec, split: str, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = _temporary(path)
    try:
        pq.write_table(pa.Table.from_pylist(list(rows(spec, split)), schema=schema()), temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    # The process id keeps two writers of one folder apart; in the same folder, so that the rename is atomic.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_written(spec: ProblemSpec, folder: Path, paths: dict[str, Path]) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {split: _digest(path) for split, path in paths.items()}
    except (OSError, json.JSONDecodeError):
        return False
    return manifest.get("fingerprint") == spec.fingerprint() and manifest.get("files") == files
