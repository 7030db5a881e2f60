"""Problems of reasoning-gym's tasks, as rows that every command reads. They have no traces."""

import json
from importlib.util import find_spec
from typing import Any

from luffy.errors import UserError
from luffy.rewards.gym import MISSING, digest, make_dataset

ASKED = "\n\nGive the final answer between <answer> and </answer>."


def make_rows(task: str, count: int, seed: int, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the plain schema; the answer is what `grade_gym` takes."""
    if find_spec("reasoning_gym") is None:
        raise UserError(f"gym: {MISSING}")
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise UserError(f"gym: reasoning-gym has no task {task!r}; it has {', '.join(sorted(DATASETS))}")
    try:
        dataset = make_dataset(task, count, seed, json.dumps(config))
        entries = [dataset[index] for index in range(count)]
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"gym: {task} does not take {config or 'its defaults'}: {error}") from error
    place = {"task": task, "config": config, "seed": seed, "size": count}
    return [
        {
            "prompt": entry["question"] + ASKED,
            "answer": json.dumps(place | {"index": index, "question": digest(entry["question"])}),
            "data_source": f"gym/{task}",
        }
        for index, entry in enumerate(entries)
    ]
