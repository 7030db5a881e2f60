"""What the loop asks of a rollout engine: token ids in, token ids and log-probs out, and the policy's weights from time
to time. Whoever answers - vLLM in this process, vLLM servers - is chosen by `rollout.engine`.

Answers come as they are finished, so that they can be graded while others are still being sampled, and sampling can be
stopped when there are enough.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    import torch

    from luffy.model import Policy

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [begin, end) of an answer were sampled with the weights of `version`."""

    version: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer, or as much of it as was sampled."""

    token_ids: Ids
    """With the EOS if the answer is finished."""
    logp: tuple[float, ...]
    """Log-prob of each token under the sampling distribution, nats."""
    finished: bool
    """False where `max_tokens` cut the answer off, or sampling was stopped."""
    versions: tuple[Span, ...] = ()
    """Which weights sampled what, in order."""

    def then(self, more: "Completion") -> "Completion":
        """This one, gone on with."""
        at = len(self.token_ids)
        later = tuple(Span(span.version, at + span.begin, at + span.end) for span in more.versions)
        return Completion(
            self.token_ids + more.token_ids, self.logp + more.logp, more.finished, merged(self.versions + later)
        )


def merged(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """Neighbours of one version as one; none that is empty."""
    found: list[Span] = []
    for span in spans:
        if span.begin == span.end:
            continue
        if found and found[-1].version == span.version:
            found[-1] = Span(span.version, found[-1].begin, span.end)
        else:
            found.append(span)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Request:
    """What to sample; the same request of the same weights has the same answers, to rounding."""

    prompt: Ids
    count: int
    """Completions to draw."""
    max_tokens: int
    """Of a completion, EOS included."""
    seed: int
    top_p: float = 1.0
    """Below 1 the log-probs are those of the tokens that are left."""


class Generation(Protocol):
    """Requests that are being answered. Nothing is lost by stopping: what has been sampled so far is given back."""

    @property
    def waiting(self) -> int:
        """Requests whose answers nobody has taken."""

    def take(self, timeout: float) -> list[tuple[int, list[Completion]]]:
        """(index of the request, its completions) of those that are answered by now; waits for one, but not longer than
        `timeout` seconds. A request that the engine refuses is answered with no completions, and counted."""

    def stop(self) -> dict[int, list[Completion]]:
        """End what is being sampled; index of each request that nobody has taken -> what there is of its completions,
        perhaps without a token, perhaps finished; [] where it was not begun."""


class Engine(Protocol):
    """Whoever samples for a rank. Used inside a `with`, which closes it."""

    @property
    def version(self) -> int:
        """Of the weights that it holds: how many updates of the policy they have seen."""

    def awake(self) -> AbstractContextManager[None]:
        """Requests are answered inside this alone; outside an engine may give its memory to others, and forget its
        weights."""

    def begin(self, requests: Sequence[Request], temperature: float) -> Generation:
        """Answer the requests, begun in their order; temperature 0 is greedy."""

    def score(self, sequences: Sequence[Ids]) -> list[list[float]]:
        """Log-prob of every token but the first of each sequence, at temperature 1, nats."""

    def sync(self, policy: "Policy", dtype: "torch.dtype", version: int) -> int:
        """Take over the policy's weights, in `dtype`, as `version`; returns how many tensors there were. Collective.

        Raises:
            UserError: the engine has parameters that the policy has nothing for.
        """

    def abort(self) -> None:
        """Let go of everything that is being generated, for nobody will use it."""

    def metrics(self) -> dict[str, float]:
        """What has happened since it was asked last, of this rank; counts."""

    def close(self) -> None:
        """Give back memory, processes and ports; it is not asked again."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def generate(engine: Engine, requests: Sequence[Request], temperature: float) -> list[list[Completion]]:
    """Every request's completions, once all are there; [] of one that the engine refuses."""
    found: list[list[Completion]] = [[] for _ in requests]
    generation = engine.begin(requests, temperature)
    while generation.waiting:
        for index, completions in generation.take(timeout=60):
            found[index] = completions
    return found
