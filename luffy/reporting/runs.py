"""A run folder as a reader sees it: complete, interrupted or still training."""

import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from luffy.errors import UserError
from luffy.files import read_jsonl
from luffy.run_folder import RunFolder

SAMPLES = 40
"""Shown of a run."""


class NoStepYet(UserError):
    """There will be something to report."""

    def __init__(self, run: str) -> None:
        super().__init__(f"report: {run} has taken no step yet; come back after the first, or let --watch wait for it")
        self.run = run


@dataclass(slots=True)
class Run:
    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    """Of the last evaluation, with `step` and `set`."""
    result: dict[str, Any] | None = field(repr=False)
    """None: the run is not complete."""

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of the steps that have a number under this key."""
        return [(one["step"], float(one[key])) for one in self.steps if isinstance(one.get(key), (int, float))]

    def untouched(self, key: str) -> float | None:
        """In the first step, whose weights no update has changed; None where there is no such number."""
        return next((value for _, value in self.series(key)), None)

    def first(self, key: str) -> float | None:
        """Mean over the first fifth of the steps, None where there are none."""
        values = self._values(key)
        return _mean(values[: _fifth(values)])

    def last(self, key: str) -> float | None:
        """As `first`, over the last fifth."""
        values = self._values(key)
        return _mean(values[-_fifth(values) :])

    def total(self, key: str) -> float:
        return sum(value for _, value in self.series(key))

    def accuracy(self, name: str = "heldout") -> list[tuple[int, float, float, float]]:
        """(step, accuracy, low, high) of the evaluations on this set."""
        return [(one["step"], one["accuracy"], *one["interval"]) for one in self.evals if one["name"] == name]

    def _values(self, key: str) -> list[float]:
        return [value for _, value in self.series(key)]


def _fifth(values: Sequence[float]) -> int:
    return max(1, round(0.2 * len(values)))


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def load(path: str) -> Run:
    """
    Raises:
        UserError: there is no run.
        NoStepYet: it has taken no step.
    """
    folder = RunFolder(path)
    if not folder.holds_a_run:
        raise UserError(f"report: {path} is no run folder (it has no config.toml); name one, such as runs/quickstart")
    steps = read_jsonl(folder.metrics) if folder.metrics.exists() else []
    if not steps:
        raise NoStepYet(path)
    config = tomllib.loads((folder.path / "config.toml").read_text(encoding="utf-8"))
    return Run(path.rstrip("/"), config, _json(folder.path / "environment.json"), steps, folder.read_evals(),
               list(_samples(folder.samples)), folder.result)  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _samples(folder: Path) -> Iterator[dict[str, Any]]:
    """Of each set the newest file, some lines of it: right and wrong ones by turns, as far as there are both."""
    newest = {path.name.rsplit("-step-", 1)[0]: path for path in sorted(folder.glob("*-step-*.jsonl"))}
    for name, path in newest.items():
        lines = read_jsonl(path)
        right = [line for line in lines if line.get("reward", 0) >= 1]
        wrong = [line for line in lines if line.get("reward", 0) < 1]
        half = SAMPLES // max(1, len(newest)) // 2
        kept = right[: half + max(0, half - len(wrong))] + wrong[: half + max(0, half - len(right))]
        for line in kept:
            yield line | {"set": name, "step": int(path.stem.rsplit("-", 1)[1])}
