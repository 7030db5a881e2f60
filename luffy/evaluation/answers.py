"""A model's answers, kept as they come: an evaluation that was interrupted goes on with the questions that are left.

    DIR/<benchmark>.jsonl    what the answers are of, then a line for each question:
                             {"id", "prompt": digest, "answers": [{"text", "tokens", "finished"}, ...]}

The i-th answer to a question is the same whatever the number of them, so that those for a larger --n serve a smaller
one. Answers are a function of weights, prompt and seed, to rounding, which depends on what else is sampled at the time.
On a CPU questions are asked a block at a time, and a block that was interrupted is asked again as a whole: so an
evaluation in parts comes to the very answers of one without a break.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, cast

from luffy.errors import UserError
from luffy.evaluation.questions import Question
from luffy.files import disk_errors
from luffy.prompts import PromptTemplate
from luffy.rollout.engine import Completion, Engine, Request
from luffy.seeds import derive

PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn; temperature 0 is greedy, top_p 1 leaves all tokens in."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer: its text, and how many tokens that is, EOS included."""

    text: str
    tokens: int
    finished: bool
    """False where the token limit cut it off."""


class Store:
    """Answers in a file, by question. about: what must be equal for them to go on.

    Raises UserError where the file holds answers of something else, or is none of ours.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self._answers = path, dict[str, tuple[str, list[Answered]]]()
        head = json.dumps({"about": about}, sort_keys=True)
        with disk_errors(f"answers: {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = self._read(about) if path.exists() else 0
            self._file = path.open("r+b" if whole else "wb")
            self._file.truncate(whole)  # a line that a kill cut short
            self._file.seek(whole)
            if not whole:
                self._write(head)

    def _read(self, about: dict[str, Any]) -> int:
        """Bytes of the lines that are whole."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines:
            return 0
        try:
            there = json.loads(lines[0])["about"]
            for line in map(json.loads, lines[1:]):
                found = [Answered(**answer) for answer in line["answers"]]
                self._answers[line["id"]] = (line["prompt"], found)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"answers: {self.path} is not a file of theirs; take another --out") from error
        other = [name for name in {**there, **about} if there.get(name) != about.get(name)]
        if other:
            raise UserError(
                f"answers: those in {self.path} have another {other[0]} ({there.get(other[0])!s:.60}, now "
                f"{about.get(other[0])!s:.60}); take another --out, or remove them"
            )
        return len(whole)

    def __contains__(self, question: Question) -> bool:
        prompt, found = self._answers.get(question.id, ("", []))
        return prompt == question.digest and len(found) >= question.count

    def __getitem__(self, question: Question) -> list[Answered]:
        return self._answers[question.id][1][: question.count]

    def add(self, question: Question, answers: list[Answered]) -> None:
        """Keep them, on the disk before this returns. Raises UserError where it is full or not writable."""
        self._answers[question.id] = (question.digest, answers)
        record = {"id": question.id, "prompt": question.digest, "answers": [asdict(answer) for answer in answers]}
        with disk_errors(f"answers: {self.path}"):
            self._write(json.dumps(record))

    def _write(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def sample(
    engine: Engine,
    template: PromptTemplate,
    questions: Sequence[Question],
    sampling: Sampling,
    store: Store,
    answered: Callable[[Question, list[Answered]], None],
    block: int | None = None,
) -> None:
    """Answer the questions that the store has no answers to; `answered` is called as each is.

    block: completions that are sampled together, whichever of them are there already, by an engine that is `Forgetful`;
    None: what is left, at once.
    """
    if block is None:
        _sample(engine, template, [q for q in questions if q not in store], sampling, store, answered)
        return
    for part in blocks(questions, block):
        if any(question not in store for question in part):
            cast(Forgetful, engine).forget_prompts()
            _sample(engine, template, part, sampling, store, answered)


class Forgetful(Protocol):
    """An engine that can be brought to where it was before it was asked anything."""

    def forget_prompts(self) -> None:
        """Drop what it has cached of prompts, which changes how later ones are rounded."""


def blocks(questions: Sequence[Question], completions: int) -> Iterator[list[Question]]:
    """Runs of questions with at most so many completions together, or a single one."""
    part: list[Question] = []
    for question in questions:
        if part and sum(q.count for q in part) + question.count > completions:
            yield part
            part = []
        part.append(question)
    if part:
        yield part


def _sample(
    engine: Engine,
    template: PromptTemplate,
    asked: Sequence[Question],
    sampling: Sampling,
    store: Store,
    answered: Callable[[Question, list[Answered]], None],
) -> None:
    requests = [
        Request(q.prompt_ids, q.count, sampling.max_tokens, derive(sampling.seed, "eval", q.id), sampling.top_p)
        for q in asked
    ]
    with engine.awake():
        generation = engine.begin(requests, sampling.temperature)
        try:
            while generation.waiting:
                for index, completions in generation.take(timeout=PATIENCE_S):
                    question = asked[index]
                    if question in store:
                        continue
                    # what the engine refuses has no answer, which is not a right one
                    found = completions or [Completion((), (), False)] * question.count
                    texts = [Answered(template.decode(c.token_ids), len(c.token_ids), c.finished) for c in found]
                    store.add(question, texts)
                    answered(question, texts)
        except BaseException:
            generation.stop()
            raise
