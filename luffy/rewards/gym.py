"""Tasks of reasoning-gym (arXiv 2505.24760), graded by their own verifiers. Needs the `gym` extra.

An answer is a problem's place, as `luffy.problems.gym` writes it: {task, config, seed, size, index, question}. The
verifier gets the task's entry made anew from it, for not everything in an entry survives a file; `question` is its
digest, so that a version of the package that makes other problems is noticed.
"""

import functools
import hashlib
import json
import re
from typing import Any

from luffy.rewards.golds import Answer, golds_of
from luffy.rewards.texts import final_answer

MISSING = "reasoning-gym is not installed; install the `gym` extra of luffy-rl, or the package itself"
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def grade_gym(response: str, answer: Answer) -> float:
    """The verifier's score, 0 to 1, of what stands in the last `<answer>` tags, or else of the final answer.

    Raises:
        ValueError: the installed package makes another problem of the place than the one that was asked.
    """
    tagged = _TAGGED.findall(response)
    said = tagged[-1].strip() if tagged else final_answer(response)
    return max(_score(said, json.loads(gold)) for gold in golds_of(answer))


def _score(said: str, place: dict[str, Any]) -> float:
    dataset = make_dataset(place["task"], place["size"], place["seed"], json.dumps(place["config"]))
    entry = dataset[place["index"]]
    if digest(entry["question"]) != place["question"]:
        raise ValueError(
            f"gym: problem {place['index']} of {place['task']} is another one than was asked: the problems are of "
            f"another version of reasoning-gym; make them again"
        )
    return min(1.0, max(0.0, float(dataset.score_answer(answer=said, entry=entry))))


@functools.lru_cache(maxsize=64)
def make_dataset(task: str, size: int, seed: int, config: str) -> Any:
    """The data set of a task. config: JSON.

    Raises:
        ValueError, TypeError, AssertionError: as reasoning-gym does.
    """
    import reasoning_gym

    return reasoning_gym.create_dataset(task, size=size, seed=seed, **json.loads(config))


def digest(question: str) -> str:
    """By which another question in the same place is noticed."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]
