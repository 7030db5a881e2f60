"""Which ranks hold up the others, in a sentence."""

from typing import Any


def describe_hang(statuses: dict[int, dict[str, Any]], now: float) -> tuple[str, list[int]]:
    """(one sentence, the ranks that are behind) from each rank's step, phase, its order in the step, and since when.

    >>> at = {"step": 3, "phase": "gather", "order": 2, "since": 60.0}
    >>> describe_hang({0: at, 1: at, 2: {**at, "phase": "rollout", "order": 1, "since": 0.0}}, 660.0)
    ('step 3 hangs: rank 2 is in `rollout` for 11 min, ranks 0-1 wait in `gather`', [2])
    """
    places: dict[tuple[int, int, str], list[int]] = {}
    for rank, status in sorted(statuses.items()):
        place = status.get("step", -1), status.get("order", -1), status.get("phase", "no phase")
        places.setdefault(place, []).append(rank)
    first, *others = sorted(places)
    behind = places[first]
    since = min((statuses[rank]["since"] for rank in behind if "since" in statuses[rank]), default=None)
    long = f" for {_duration(now - since)}" if since is not None else ""
    step = max(place[0] for place in places)
    if not others:
        who = _names(behind) if len(behind) == 1 else f"all {len(behind)} ranks"
        return f"step {step} hangs: {who} {_verb('is', behind)} in `{first[2]}`{long}", behind
    waiting = ", ".join(f"{_names(places[p])} {_verb('waits', places[p])} in `{p[2]}`" for p in others)
    return f"step {step} hangs: {_names(behind)} {_verb('is', behind)} in `{first[2]}`{long}, {waiting}", behind


def _names(ranks: list[int]) -> str:
    """rank 2; ranks 0-1, 3."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


def _verb(one: str, ranks: list[int]) -> str:
    return one if len(ranks) == 1 else {"is": "are", "waits": "wait"}[one]


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
