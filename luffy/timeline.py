"""What ran when, as a file that Perfetto (ui.perfetto.dev) and chrome://tracing open: phases of the trainer in one row,
what was sampled ahead of them in another.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from luffy.files import disk_errors

ROWS = {"ahead": 2}  # everything else is the trainer's, row 1


def append(path: Path, step: int, events: Iterable[tuple[str, float, float]]) -> None:
    """events: (name, time.time() when it began, seconds) of a step. The list is never closed, which both viewers allow:
    so it is whole at every moment."""
    lines = [] if path.exists() else ["[", *(_name(row, text) for row, text in ((1, "trainer"), (2, "sampling ahead")))]
    for name, began, seconds in events:
        about = {"name": f"{name}, step {step}", "ph": "X", "ts": round(1e6 * began), "dur": round(1e6 * seconds)}
        lines.append(json.dumps(about | {"pid": 1, "tid": ROWS.get(name, 1)}) + ",")
    with disk_errors("timeline"), path.open("a") as file:
        file.write("\n".join(lines) + "\n")


def _name(row: int, text: str) -> str:
    return json.dumps({"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": text}}) + ","
