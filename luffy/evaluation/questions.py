"""What is asked of a model: problems, each once, by benchmark."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from luffy.data import Example

Answer = str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A problem as a model is asked it."""

    id: str
    text: str
    """The last turn of the prompt."""
    prompt_ids: tuple[int, ...]
    answer: Answer
    count: int
    """Answers that are sampled."""

    @property
    def digest(self) -> str:
        """Of the prompt; answers to another one are of no use."""
        return hashlib.sha256(repr(self.prompt_ids).encode()).hexdigest()[:16]


def benchmarks_of(examples: Sequence[Example], n: int, *, several: bool = True) -> dict[str, list[Question]]:
    """Questions by data source, in order. Rows that repeat a question, as files do for avg@k, are one with more
    answers: n for each row; or one in all unless `several`, for equal answers say no more."""
    rows: dict[tuple[str, tuple[int, ...], Answer], list[Example]] = defaultdict(list)
    for example in examples:
        rows[example.problem.data_source, example.prompt_ids, example.problem.answer].append(example)
    found: dict[str, list[Question]] = defaultdict(list)
    for (source, prompt_ids, answer), same in rows.items():
        problem = same[0].problem
        text = problem.messages[-1]["content"]
        found[source].append(Question(problem.id, text, prompt_ids, answer, n * len(same) if several else 1))
    return dict(found)
