"""The file that `luffy.token_records` writes at an evaluation: a line a row of a group, a token's numbers in lists."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luffy.errors import UserError, first_line
from luffy.files import new_file

NUMBERS = ("logp", "entropy", "advantage", "slope")
"""Of every token: nats, nats, as the loss has it, d loss / d logp with the token's weight."""


TYPES = {
    **dict.fromkeys(("group", "sampled", "example", "prefix", "length"), "int64"),
    **dict.fromkeys(("watched", "is_trace", "finished"), "bool"),
    **dict.fromkeys(("id", "question", "answer", "teacher", "verdict"), "string"),
    "reward": "double",
    "tokens": "strings",
    "token_ids": "ints",
}
"""Of columns; all others are lists of float32."""


def name_of(step: int) -> str:
    return f"step-{step:06d}.parquet"


def step_of(path: Path) -> int:
    """-1: it is no such file."""
    found = re.fullmatch(r"step-(\d+)\.parquet", path.name)
    return int(found[1]) if found else -1


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """Whole or not at all; compressed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = {"strings": pa.list_(pa.string()), "ints": pa.list_(pa.int32()), "numbers": pa.list_(pa.float32())}
    names = dict.fromkeys(name for line in lines for name in line)
    types = {name: TYPES.get(name, "numbers") for name in names}
    schema = pa.schema([(name, lists.get(kind) or pa.type_for_alias(kind)) for name, kind in types.items()])
    with new_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(lines, schema), temporary, compression="zstd")


def read(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Lines of a file, as they were written, or these columns of them.

    Raises:
        UserError: the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, columns=columns and list(columns)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"tokens: {path} is not a Parquet file of token records ({first_line(error)}); delete it, or bring it back"
        ) from error
