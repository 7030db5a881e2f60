"""From the shards that DCP wrote to whole safetensors files, as a stream: a buffer of memory, whatever the size.

torch 2.13 has a consolidation of its own, which is not used: it holds a whole tensor and more, writes 0-d tensors as
zeros, refuses integer ones, leaves the data unaligned and the header without the "format" that loaders look for,
flushes nothing, and would be followed by a second reading for the checksum.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

BUFFER = 16 * 2**20  # bytes
Facts = dict[str, int | str]
"""{"bytes": size of a file, "sha256": of its contents}."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Whole rows [first_row, first_row + shape[0]) of a tensor, as the bytes [begin, end) of `file`."""

    file: Path
    begin: int
    end: int
    first_row: int
    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """(the JSON header of a safetensors file, where its data begins).

    Raises:
        ValueError: it is not one, or was cut off within the header.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= path.stat().st_size - 8:
            raise ValueError(f"{path.name} is cut off, or no safetensors file")
        return json.loads(file.read(length)), 8 + length


def consolidate(shards: Iterable[Path], shapes: Mapping[str, tuple[int, ...]], out: Path) -> Facts:
    """Join the rows of every tensor of `shapes`, in that order, into the safetensors file `out`.

    Raises:
        ValueError: the shards are not whole rows that cover each tensor once.
        OSError: from reading and writing.
    """
    pieces = _find(shards)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        rows = pieces.get(name, [])
        _check(name, shape, rows)
        size = sum(piece.end - piece.begin for piece in rows)
        header[name] = {"dtype": rows[0].dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8, as the format's own writer has it
    return _copy(struct.pack("<Q", len(text)) + text, [piece for name in shapes for piece in pieces[name]], out)


def facts(path: Path) -> Facts:
    """Size and checksum of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def assign_files(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """Name -> number of its file, from 1: files of consecutive tensors, at most `limit` bytes or one tensor each."""
    numbers, number, held = {}, 1, 0
    for name, size in sizes.items():
        if held and held + size > limit:
            number, held = number + 1, 0
        numbers[name] = number
        held += size
    return numbers


def _find(shards: Iterable[Path]) -> dict[str, list[Piece]]:
    """Every tensor's pieces in the order of their rows."""
    pieces: dict[str, list[Piece]] = {}
    for path in shards:
        header, data = read_header(path)
        placed = json.loads(header.pop("__metadata__")["DCP_SHARDING_INFO"])
        for name, entry in header.items():
            offsets = placed[name]["saved_offsets"]
            begin, end = entry["data_offsets"]
            piece = Piece(
                path, data + begin, data + end, offsets[0] if offsets else 0, tuple(entry["shape"]), entry["dtype"]
            )
            pieces.setdefault(name, []).append(piece)
    for rows in pieces.values():
        rows.sort(key=lambda piece: piece.first_row)
    return pieces


def _check(name: str, shape: tuple[int, ...], rows: list[Piece]) -> None:
    at = 0
    for piece in rows:
        if shape and (piece.first_row != at or piece.shape[1:] != shape[1:]):
            break
        at += prod(piece.shape[:1])
    else:
        if rows and at == prod(shape[:1]):
            return
    raise ValueError(
        f"checkpoint: {name} of shape {shape} must be saved as whole rows that cover it once, got "
        f"{[(piece.first_row, piece.shape) for piece in rows]}"
    )


def _copy(header: bytes, pieces: list[Piece], out: Path) -> Facts:
    digest = hashlib.sha256(header)
    with out.open("wb") as target:
        target.write(header)
        for piece in pieces:
            with piece.file.open("rb") as source:
                source.seek(piece.begin)
                left = piece.end - piece.begin
                while left:
                    block = source.read(min(left, BUFFER))
                    if not block:
                        raise ValueError(f"checkpoint: {piece.file.name} ends {left} bytes early")
                    digest.update(block)
                    target.write(block)
                    left -= len(block)
        size = target.tell()
    return {"bytes": size, "sha256": digest.hexdigest()}
