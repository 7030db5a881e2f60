"""Rollouts from files: what another run sampled, without an engine. For debugging an update, offline objectives, and
benchmarks of everything but sampling.

`rollout.record` makes a run leave what it sampled; `rollout.engine = "replay"` answers from such a folder. An answer is
found by its prompt and its seed, which differs from step to step, so the same settings see the same rollouts in the
same order. A line of a file:

    {"prompt": [ids], "seed": 7, "temperature": 1.0, "max_tokens": 64,
     "answers": [{"ids", "logp", "finished", "versions"}, ...]}
"""

import json
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from luffy.errors import UserError
from luffy.files import disk_errors
from luffy.rollout.engine import Completion, Engine, Generation, Ids, Request, Span

if TYPE_CHECKING:
    from luffy.model import Policy

Key = tuple[Ids, int]
WRITING = threading.Lock()


class Recorder:
    """An engine that writes down what another one samples. file: of this rank; lines are appended."""

    def __init__(self, engine: Engine, file: Path) -> None:
        self.engine, self.file = engine, file
        with disk_errors("rollout.record"):
            file.parent.mkdir(parents=True, exist_ok=True)

    @property
    def version(self) -> int:
        return self.engine.version

    def awake(self) -> AbstractContextManager[None]:
        return self.engine.awake()

    def begin(self, requests: Sequence[Request], temperature: float) -> "Recording":
        return Recording(self.engine.begin(requests, temperature), requests, temperature, self.file)

    def score(self, sequences: Sequence[Ids]) -> list[list[float]]:
        return self.engine.score(sequences)

    def sync(self, policy: "Policy", dtype: torch.dtype, version: int) -> int:
        return self.engine.sync(policy, dtype, version)

    def abort(self) -> None:
        self.engine.abort()

    def metrics(self) -> dict[str, float]:
        return self.engine.metrics()

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Recording:
    """A generation whose answers are written down as they are taken."""

    def __init__(self, generation: Generation, requests: Sequence[Request], temperature: float, file: Path) -> None:
        self._generation, self._requests, self._temperature, self._file = generation, requests, temperature, file

    @property
    def waiting(self) -> int:
        return self._generation.waiting

    def take(self, timeout: float) -> list[tuple[int, list[Completion]]]:
        found = self._generation.take(timeout)
        lines = [json.dumps(self._line(self._requests[index], answers)) + "\n" for index, answers in found if answers]
        # a line at a time and one after the other: an evaluation may be recorded beside what is sampled ahead
        with disk_errors("rollout.record"), WRITING, self._file.open("a") as file:
            file.writelines(lines)
        return found

    def _line(self, request: Request, answers: list[Completion]) -> dict[str, Any]:
        told = [
            {"ids": a.token_ids, "logp": a.logp, "finished": a.finished, "versions": [astuple(s) for s in a.versions]}
            for a in answers
        ]
        asked = {"prompt": request.prompt, "seed": request.seed, "max_tokens": request.max_tokens}
        return asked | {"temperature": self._temperature, "answers": told}

    def stop(self) -> dict[int, list[Completion]]:
        return self._generation.stop()


class Told:
    """A generation that is finished when it begins."""

    def __init__(self, answers: list[list[Completion]]) -> None:
        self._answers = dict(enumerate(answers))

    @property
    def waiting(self) -> int:
        return len(self._answers)

    def take(self, timeout: float) -> list[tuple[int, list[Completion]]]:
        found, self._answers = list(self._answers.items()), {}
        return found

    def stop(self) -> dict[int, list[Completion]]:
        return dict(self.take(0))


class Replay:
    """folder: of JSON-lines files as `Recorder` leaves them, whoever wrote them.

    Raises:
        UserError: there are none, or one is no such file.
    """

    def __init__(self, folder: Path, version: int = 0) -> None:
        self.folder, self.version = folder, version
        self._answers: dict[Key, dict[str, Any]] = {}
        files = sorted(folder.glob("*.jsonl"))
        if not files:
            raise UserError(f"rollout.replay: {folder} has no *.jsonl files; a run with rollout.record leaves them")
        for file in files:
            with disk_errors("rollout.replay"):
                lines = file.read_text().splitlines()
            for number, line in enumerate(lines, start=1):
                try:
                    entry = json.loads(line)
                    self._answers[tuple(entry["prompt"]), int(entry["seed"])] = entry
                except (ValueError, KeyError, TypeError) as error:
                    if number == len(lines):
                        continue  # a kill may cut the last line off
                    raise UserError(
                        f"rollout.replay: line {number} of {file} is no recorded rollout: {error}"
                    ) from error

    def awake(self) -> AbstractContextManager[None]:
        return nullcontext()

    def begin(self, requests: Sequence[Request], temperature: float) -> "Told":
        """
        Raises:
            UserError: a prompt was not asked with this seed, or fewer answers to it, or otherwise.
        """
        return Told([self._find(request, temperature) for request in requests])

    def _find(self, request: Request, temperature: float) -> list[Completion]:
        entry = self._answers.get((tuple(request.prompt), request.seed))
        if entry is None:
            raise UserError(
                f"rollout.replay: {self.folder} has no answers to a prompt of {len(request.prompt)} tokens with seed "
                f"{request.seed}; it was recorded with other data, another train.seed or fewer steps"
            )
        for name, value in (("temperature", temperature), ("max_tokens", request.max_tokens)):
            if entry[name] != value:
                raise UserError(
                    f"rollout.replay: {self.folder} was recorded with {name} {entry[name]}, asked for {value}"
                )
        if len(entry["answers"]) < request.count:
            raise UserError(
                f"rollout.replay: {self.folder} has {len(entry['answers'])} answers to a prompt, and {request.count} "
                f"are asked for"
            )
        return [
            Completion(tuple(a["ids"]), tuple(a["logp"]), a["finished"], tuple(Span(*span) for span in a["versions"]))
            for a in entry["answers"][: request.count]
        ]

    def score(self, sequences: Sequence[Ids]) -> list[list[float]]:
        raise UserError("rollout.replay: recorded rollouts cannot score other tokens; choose another rollout.engine")

    def sync(self, policy: "Policy", dtype: torch.dtype, version: int) -> int:
        """Nothing to do: what was sampled was sampled."""
        self.version = version
        return 0

    def abort(self) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
