"""Parts into one parquet file in LUFFY's schema, and the report beside it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from luffy.data.problem import DataError
from luffy.files import new_file, write_json
from luffy.prepare.options import Options, digest
from luffy.prepare.tally import Tally

REPORT = "report.json"


def schema(options: Options, several: bool) -> Any:
    """The pyarrow schema: the published columns, with the source's id and name in `extra_info`.

    several: some problem has more than one accepted answer, so that `ground_truth` is a list.
    """
    import pyarrow as pa

    text = pa.string()
    turns = pa.list_(pa.struct([("content", text), ("role", text)]))
    truth = pa.list_(text) if several else text
    columns = [
        ("data_source", text),
        ("prompt", turns),
        ("target", turns),
        ("ability", text),
        ("reward_model", pa.struct([("ground_truth", truth), ("style", text)])),
        ("extra_info", pa.struct([("index", pa.int64()), ("split", text), ("id", text), ("source", text)])),
        ("target_lst", pa.list_(text)),
        ("target_teachers", pa.list_(text)),
    ]
    absent = set() if options.traces else {"target", "target_teachers"}
    absent |= set() if options.traces > 1 else {"target_lst"}
    return pa.schema([column for column in columns if column[0] not in absent])


def write_result(
    out: Path, options: Options, record: Mapping[str, Any], tally: Tally, parts: Iterable[list[dict[str, Any]]]
) -> dict[str, Any]:
    """The report comes last: where it is, everything is. Raises DataError when no problem is left."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not tally.problems["kept"]:
        raise DataError(f"{options.place}: no problem is left: {tally}")
    columns = schema(options, bool(tally.several_answers))
    path = out / f"{options.split or 'train'}.parquet"
    with new_file(path) as temporary, pq.ParquetWriter(temporary, columns, compression="zstd") as file:
        for rows in parts:
            for row in rows if tally.several_answers else ():
                truth = row["reward_model"]["ground_truth"]
                row["reward_model"]["ground_truth"] = [truth] if isinstance(truth, str) else truth
            if rows:
                file.write_table(pa.Table.from_pylist(rows, schema=columns))
    report = {"file": path.name, "sha256": digest(path), "options": record, **tally.record()}
    write_json(out / REPORT, report)
    return report
