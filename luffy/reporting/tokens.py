"""What the page shows of single tokens: the records of a run's evaluations, a group's rows over all of them."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from luffy.reporting.runs import Run
from luffy.token_file import NUMBERS, read, step_of

MOST_BYTES = 3_000_000
"""In a page, of all runs."""
MOST_STEPS = 24
"""Of a group that is scored again and again; the first and the last are among them."""
SIZES = ((24, 1024), (12, 1024), (6, 1024), (3, 1024), (2, 1024), (2, 512), (2, 256), (2, 64))
"""(evaluations, tokens of a row) of a group, the first that fits into half of the room."""
MOST_QUESTION = 1200
"""Characters."""
SHAPED = ("luffy", "exgrpo")
"""Objectives whose traces have LUFFY's loss alone."""
OWN = ("exgrpo",)
"""Objectives whose stored answers are the policy's own."""
SHOWN = (
    *("group", "watched", "sampled", "id", "question", "answer", "is_trace", "teacher", "reward", "finished"),
    *("prefix", "length", "tokens", "sampler_logp", "behaviour", *NUMBERS),
)

Lines = list[dict[str, Any]]


def token_groups(runs: list[Run]) -> tuple[list[dict[str, Any]], int]:
    """(groups as the page has them, number of groups that it has no room for). Of each run the watched ones come first,
    then fresh ones, the newest first.

    Raises:
        UserError: a file of records is damaged.
    """
    kept: list[dict[str, Any]] = []
    left = 0
    for number, run in enumerate(runs):
        room = MOST_BYTES // len(runs)
        files = {step_of(path): path for path in sorted(Path(run.name, "tokens").glob("step-*.parquet"))}
        files.pop(-1, None)
        for by_step in chain(_watched(files), _fresh(files)):
            group = fitted(run, number, by_step, MOST_BYTES // len(runs) // 2)
            size = bytes_of(group)
            if size > room:
                break  # the newest come first
            room -= size
            kept.append(group)
        left += _count(files) - sum(group["run"] == number for group in kept)
    return kept, left


def _count(files: dict[int, Path]) -> int:
    """Of groups: those that are watched once, and all fresh ones."""
    found = {("watched" if line["watched"] else step, line["group"]) for step, path in files.items()
             for line in read(path, ("watched", "group"))}  # fmt: skip
    return len(found)


def _watched(files: dict[int, Path]) -> Iterator[dict[int, Lines]]:
    """Lines by step of every group that is scored again and again."""
    steps = {step: [cut(line) for line in read(files[step], SHOWN)] for step in spread(list(files), MOST_STEPS)}
    numbers = dict.fromkeys(line["group"] for lines in steps.values() for line in lines if line["watched"])
    for number in numbers:
        found = {step: [line for line in lines if line["group"] == number] for step, lines in steps.items()}
        yield {step: lines for step, lines in found.items() if lines}


def _fresh(files: dict[int, Path]) -> Iterator[dict[int, Lines]]:
    """Lines of every group that is scored once, by its step."""
    for step in reversed(files):
        lines = [cut(line) for line in read(files[step], SHOWN) if not line["watched"]]
        for number in dict.fromkeys(line["group"] for line in lines):
            yield {step: [line for line in lines if line["group"] == number]}


def cut(line: dict[str, Any]) -> dict[str, Any]:
    """To the most that a page shows of a row."""
    return {name: value[: SIZES[0][1]] if isinstance(value, list) else value for name, value in line.items()}


def fitted(run: Run, number: int, by_step: dict[int, Lines], most: int) -> dict[str, Any]:
    """The group with as many of its evaluations and tokens as `most` bytes hold, or with the fewest."""
    for steps, tokens in SIZES:
        kept = {step: by_step[step] for step in spread(list(by_step), steps)}
        group = shown(run, number, kept, tokens)
        if bytes_of(group) <= most:
            break
    return group


def bytes_of(group: dict[str, Any]) -> int:
    return len(json.dumps(group, separators=(",", ":")))


def shown(run: Run, number: int, by_step: dict[int, Lines], most: int) -> dict[str, Any]:
    """by_step: the group's rows, the same ones, by the weights after each of these steps. most: tokens of a row."""
    newest = by_step[max(by_step)]
    first, objective = newest[0], run.config.get("objective", {})
    name = objective.get("name", "luffy")
    shaped = name in SHAPED and objective.get("off_policy", "shaped") == "shaped"
    return {
        "run": number,
        "id": first["id"],
        "question": first["question"][:MOST_QUESTION],
        "answer": first["answer"][:MOST_QUESTION],
        "sampled": first["sampled"],
        "gamma": objective.get("gamma") if shaped else None,
        "steps": list(by_step),
        "rows": [
            {
                "trace": row["is_trace"],
                "own": row["is_trace"] and name in OWN,
                "teacher": row["teacher"],
                "reward": row["reward"],
                "finished": row["finished"],
                "given": row["prefix"],
                "length": row["length"],
                "tokens": row["tokens"][:most],
                "wrote": rounded((row["behaviour"] if row["is_trace"] else row["sampler_logp"])[:most]),
                **{name: [rounded(rows[at][name][:most]) for rows in by_step.values()] for name in NUMBERS},
            }
            for at, row in sorted(enumerate(newest), key=lambda one: not one[1]["is_trace"])
        ],
    }


def spread(steps: list[int], most: int) -> list[int]:
    """At most so many of them, evenly, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(at * (len(steps) - 1) / (most - 1))] for at in range(most)]


def rounded(values: list[float]) -> list[float | None]:
    """To a hundred-thousandth and four digits; JSON has no NaN."""
    return [float(f"{round(value, 5):.4g}") if value == value else None for value in values]
