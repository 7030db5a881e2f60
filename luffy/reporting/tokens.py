"""What the page shows of single tokens: the records of a run's evaluations, a group's rows over all of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luffy.reporting.runs import Run
from luffy.token_file import NUMBERS, read, step_of

MOST_NUMBERS = 500_000
"""In a page, of all runs; each takes about six characters. A group has half of them at most."""
MOST_STEPS = 24
"""Of a group that is scored again and again, or as many as fit; the first and the last are among them."""
MOST_TOKENS = 1024
"""Of a row."""
MOST_QUESTION = 1200
"""Characters."""


def token_groups(runs: list[Run]) -> tuple[list[dict[str, Any]], int]:
    """(groups as the page has them, number of groups that it has no room for). Of each run the watched ones come first,
    then fresh ones, the newest first."""
    found = [list(groups_of(run, at)) for at, run in enumerate(runs)]
    kept: list[dict[str, Any]] = []
    left, room = 0, MOST_NUMBERS
    for rank in range(max(map(len, found), default=0)):  # by turns, so that every run has its part
        for groups in found:
            if rank < len(groups):
                room -= size_of(groups[rank])
                left += room < 0
                kept += [groups[rank]] if room >= 0 else []
    return sorted(kept, key=lambda group: group["run"]), left


def groups_of(run: Run, number: int) -> Iterator[dict[str, Any]]:
    files = {step_of(path): path for path in Path(run.name, "tokens").glob("step-*.parquet")}
    lines = {step: read(files[step]) for step in sorted(files)}
    watched: dict[int, dict[int, list[dict[str, Any]]]] = {}
    fresh: list[dict[str, Any]] = []
    for step, of_step in lines.items():
        for group in dict.fromkeys(line["group"] for line in of_step):
            rows = [line for line in of_step if line["group"] == group]
            if rows[0]["watched"]:
                watched.setdefault(group, {})[step] = rows
            else:
                fresh.append(shown(run, number, {step: rows}))
    for by_step in watched.values():
        steps = spread(list(by_step), most_steps(next(iter(by_step.values()))))
        yield shown(run, number, {step: by_step[step] for step in steps})
    yield from reversed(fresh)


def most_steps(rows: list[dict[str, Any]]) -> int:
    numbers = len(NUMBERS) * sum(min(len(row["tokens"]), MOST_TOKENS) for row in rows)
    return max(2, min(MOST_STEPS, MOST_NUMBERS // 2 // max(1, numbers)))


def shown(run: Run, number: int, by_step: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """by_step: the group's rows, the same ones, by the weights after each of these steps."""
    newest = by_step[max(by_step)]
    line, objective = newest[0], run.config.get("objective", {})
    traces_first = sorted(range(len(newest)), key=lambda at: not newest[at]["is_trace"])
    return {
        "run": number,
        "id": line["id"],
        "question": line["question"][:MOST_QUESTION],
        "answer": line["answer"],
        "sampled": line["sampled"],
        "gamma": objective.get("gamma") if objective.get("off_policy", "shaped") == "shaped" else None,
        "steps": list(by_step),
        "rows": [
            {
                "trace": row["is_trace"],
                "teacher": row["teacher"],
                "reward": row["reward"],
                "finished": row["finished"],
                "given": row["prefix"],
                "length": row["length"],
                "tokens": row["tokens"][:MOST_TOKENS],
                "wrote": rounded(row["behaviour"] if row["is_trace"] else row["sampler_logp"]),
                **{name: [rounded(rows[at][name]) for rows in by_step.values()] for name in NUMBERS},
            }
            for at, row in ((at, newest[at]) for at in traces_first)
        ],
    }


def size_of(group: dict[str, Any]) -> int:
    """Numbers and texts of a group."""
    tokens = sum(len(row["tokens"]) for row in group["rows"])
    return tokens * (2 + len(NUMBERS) * len(group["steps"]))


def spread(steps: list[int], most: int) -> list[int]:
    """At most so many of them, evenly, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(at * (len(steps) - 1) / (most - 1))] for at in range(most)]


def rounded(values: list[float]) -> list[float | None]:
    """To four digits, of the tokens that are shown; JSON has no NaN."""
    return [float(f"{value:.4g}") if value == value else None for value in values[:MOST_TOKENS]]
