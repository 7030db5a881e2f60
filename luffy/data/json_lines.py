"""Files of JSON objects, one to a line, whoever wrote them."""

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

from luffy.data.problem import DataError


def json_lines(path: Path) -> Generator[tuple[int, str, dict[str, Any]], None, None]:
    """(number of the line, from 1; the same to name in an error; its object), read as they are asked for. Blank lines
    are passed over. Half of a character, which sampled text may hold, is left to whoever reads the field.

    Raises:
        DataError: a line is not UTF-8, not JSON or not an object.
        OSError: the file cannot be read.
    """
    with path.open("rb") as lines:  # decoded by the line, so that the one that cannot be is known
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield number, where, _object(line, where)


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.rstrip().decode("utf-8", "surrogatepass"))  # without its end, which would count as a line
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: must be text in UTF-8, got byte 0x{line[error.start]:02x} at column {error.start + 1}; save the "
            f"file as plain UTF-8, or copy it again"
        ) from error
    except (ValueError, RecursionError) as error:  # no JSON, or more than Python reads
        why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise DataError(
            f"{where}: not valid JSON ({why}), is the file cut short? copy it again, or mend the line"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be a JSON object, got {type(row).__name__}")
    return row
