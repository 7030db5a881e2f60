"""Grade answers that lie in a file, whoever wrote them: `luffy grade FILE.jsonl --grader G`.

A line is {"response": text, "answer": text, number or a list of them, ...}; whatever else it has stays in the output.
"""

import json
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from luffy.data.json_lines import json_lines
from luffy.data.problem import DataError
from luffy.errors import UserError
from luffy.files import new_file, reading
from luffy.rewards import Verdict, VerifierPool, label

AT_A_TIME = 4096
SHOWN = 20


@dataclass(slots=True)
class Line:
    number: int
    """In the file, from 1."""
    row: dict[str, Any]
    response: str
    answer: str | tuple[str, ...]


@dataclass(slots=True)
class Graded:
    lines: int = 0
    right: int = 0
    """Of reward 1 or more."""
    rewards: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    """ok, timeout, crash."""
    together: Counter[tuple[bool, bool]] = field(default_factory=Counter)
    """(right by the first grader, right by the other)."""
    disagreements: list[tuple[Line, Verdict, Verdict]] = field(default_factory=list)
    """The first of them."""

    def add(self, line: Line, verdict: Verdict, other: Verdict | None, shown: int) -> None:
        self.lines += 1
        self.right += verdict.reward >= 1
        self.rewards += verdict.reward
        self.statuses[verdict.status] += 1
        if other is None:
            return
        self.together[verdict.reward >= 1, other.reward >= 1] += 1
        if (verdict.reward >= 1) != (other.reward >= 1) and len(self.disagreements) < shown:
            self.disagreements.append((line, verdict, other))

    def record(self, grader: str, compare: str | None) -> dict[str, Any]:
        """As JSON values. compare: the other grader."""
        found: dict[str, Any] = {"grader": label(grader), "lines": self.lines, "right": self.right}
        found |= {"mean_reward": self.rewards / self.lines, "verdicts": dict(self.statuses)}
        if compare is None:
            return found
        pairs = {"both_right": (True, True), "both_wrong": (False, False)}
        pairs |= {"right_by_first": (True, False), "right_by_second": (False, True)}
        shown = [
            {"line": line.number, "id": line.row.get("id"), "answer": line.answer, "rewards": [one.reward, two.reward]}
            for line, one, two in self.disagreements
        ]
        together = {name: self.together[pair] for name, pair in pairs.items()}
        return found | {"compare": label(compare), "together": together, "disagreements": shown}


def grade_file(
    path: Path,
    grader: str,
    *,
    compare: str | None = None,
    out: Path | None = None,
    workers: int = 2,
    timeout_s: float = 5.0,
    shown: int = SHOWN,
) -> Graded:
    """Grade every line, by a second grader too where `compare` names one.

    out: where to write the lines, in order, with `reward` and `verdict` (ok, timeout, crash); whole or not at all.
    shown: disagreements to keep.

    Raises:
        UserError: a line that is no JSON object, lacks a field or has another type there; an id that comes twice; no
            lines; a grader that does not exist; a path that cannot be written. Nothing is written then.
    """
    found = Graded()
    with ExitStack() as stack:
        lines = stack.enter_context(closing(read_lines(path)))
        if not (block := _block(lines, path)):  # before processes are started
            raise UserError(f"grade: {path} has no lines")
        pools = [
            stack.enter_context(_pool(name, workers, timeout_s))
            for name in ([grader, compare] if compare else [grader])
        ]
        written = stack.enter_context(stack.enter_context(new_file(out)).open("w")) if out else None
        while block:
            pairs = [(line.response, line.answer) for line in block]
            verdicts = [pool.grade(pairs) for pool in pools]
            for at, line in enumerate(block):
                verdict = verdicts[0][at]
                found.add(line, verdict, verdicts[1][at] if compare else None, shown)
                if written:
                    row = line.row | {"reward": verdict.reward, "verdict": verdict.status}
                    written.write(json.dumps(row) + "\n")
            block = _block(lines, path)
        if written:
            written.flush()
    return found


def _pool(grader: str, workers: int, timeout_s: float) -> VerifierPool:
    try:
        return VerifierPool(grader, workers, timeout_s)
    except ValueError as error:
        raise UserError(f"grade: {error}") from error


def _block(lines: Iterator[Line], path: Path) -> list[Line]:
    try:
        with reading(path, "grade"):
            return list(islice(lines, AT_A_TIME))
    except DataError as error:
        raise UserError(f"grade: {error}") from error


def read_lines(path: Path) -> Generator[Line, None, None]:
    """Raises DataError where `grade_file` raises UserError for a line, and what `json_lines` raises."""
    seen: dict[Any, int] = {}
    for number, where, row in json_lines(path):
        for name in ("response", "answer"):
            if name not in row:
                raise DataError(
                    f"{where}: no field `{name}`; the line has {', '.join(row) or 'none'}, and each needs "
                    f"`response` and `answer`: add it, or rename one"
                )
        if not isinstance(row["response"], str):
            raise DataError(f"{where}: `response` must be a text, got {type(row['response']).__name__}")
        if (id := row.get("id")) is not None:
            key = json.dumps([id, row.get("sample")])
            if seen.setdefault(key, number) != number:
                raise DataError(f"{where}: id {id!r} is also that of line {seen[key]}; ids must differ, or `sample`")
        yield Line(number, row, row["response"], _answer(row["answer"], where))


def _answer(value: Any, where: str) -> str | tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    good = values and all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in values)
    texts = tuple(str(one) for one in values) if good else ()
    if not texts or not all(text.strip() for text in texts):
        raise DataError(
            f"{where}: `answer` must be a text or a number, or a list of them, not empty; got {value!r:.60}"
        )
    return texts if isinstance(value, list) else texts[0]
