"""The file that `luffy.token_records` writes at an evaluation: a line a row of a group, a token's numbers in lists."""

import re
from pathlib import Path
from typing import Any

from luffy.files import new_file

NUMBERS = ("logp", "entropy", "advantage", "slope")
"""Of every token: nats, nats, as the loss has it, d loss / d logp with the token's weight."""


def name_of(step: int) -> str:
    return f"step-{step:06d}.parquet"


def step_of(path: Path) -> int:
    found = re.fullmatch(r"step-(\d+)\.parquet", path.name)
    return int(found[1]) if found else -1


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """Whole or not at all; compressed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = pa.list_(pa.float32())
    fields = dict.fromkeys((*NUMBERS, "row_advantages", "sampler_logp", "behaviour"), numbers)
    fields |= {"token_ids": pa.list_(pa.int32()), "tokens": pa.list_(pa.string())}
    columns = {name: pa.array([line[name] for line in lines], fields.get(name)) for name in lines[0]}
    with new_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of a file, as they were written."""
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()
