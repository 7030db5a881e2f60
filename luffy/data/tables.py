"""A parquet or jsonl file row by row, and a copy of it with further columns: everything else stays as it is written."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from luffy.data.problem import DataError

Row = dict[str, Any]


def blocks(path: Path, size: int) -> Iterator[list[Row]]:
    """Rows in order, at most `size` at a time; the same blocks each time."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=size):
                yield batch.to_pylist()
        return
    with path.open(encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines if line.strip())
        while block := list(islice(rows, size)):
            yield block


def copy_with(source: Path, target: Path, columns: Iterable[list[Row]], size: int) -> None:
    """Write `source` to `target`, of the same format, with `columns`: of each of its blocks the new values of each row.
    A column that is there already is replaced. Nothing is flushed or renamed.

    Raises:
        DataError: `columns` has other rows than `source`.
    """
    if source.suffix == ".parquet":
        _copy_parquet(source, target, columns, size)
        return
    with target.open("w", encoding="utf-8") as file:
        for block, values in zip(blocks(source, size), columns, strict=True):
            for row, new in _pairs(block, values, source):
                file.write(json.dumps(row | new, ensure_ascii=False) + "\n")


def _copy_parquet(source: Path, target: Path, columns: Iterable[list[Row]], size: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"target_teachers": pa.list_(pa.string()), "target_logps": pa.list_(pa.list_(pa.float32()))}
    writer = None
    try:
        with pq.ParquetFile(source) as file:
            for batch, values in zip(file.iter_batches(batch_size=size), columns, strict=True):
                table = pa.Table.from_batches([batch])
                new = [given for _, given in _pairs([{}] * len(table), values, source)]
                for name in new[0]:
                    column = pa.array([row[name] for row in new], types.get(name))
                    if name in table.column_names:
                        table = table.drop_columns(name)
                    table = table.append_column(name, column)
                writer = writer or pq.ParquetWriter(target, table.schema)
                writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _pairs(block: list[Row], values: list[Row], source: Path) -> Iterator[tuple[Row, Row]]:
    if len(block) != len(values):
        raise DataError(f"{source}: the file has other rows than it had")
    return zip(block, values, strict=True)
