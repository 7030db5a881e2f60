"""What the loop asks of a rollout engine: token ids in, token ids and log-probs out, and the policy's weights from time
to time. Whoever answers - vLLM in this process, vLLM servers - is chosen by `rollout.engine`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import torch

if TYPE_CHECKING:
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
    token_ids: Ids
    """With the EOS if the answer is finished."""
    logp: tuple[float, ...]
    """Log-prob of each token under the sampling distribution, nats."""
    finished: bool
    """False where `max_tokens` cut the answer off."""
    versions: tuple[Span, ...] = ()
    """Which weights sampled what, in order."""


class Engine(Protocol):
    @property
    def version(self) -> int:
        """Of the weights that it holds: how many updates of the policy they have seen."""

    def generate(
        self,
        prompts: Sequence[Ids],
        counts: Sequence[int],
        *,
        temperature: float,
        max_tokens: int,
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        """`counts[i]` completions of prompt i, drawn with `seeds[i]`; temperature 0 is greedy. A prompt that the engine
        refuses has none, and is counted."""

    def score(self, sequences: Sequence[Ids]) -> list[list[float]]:
        """Log-prob of every token but the first of each sequence, at temperature 1, nats."""

    def sync(self, policy: "Policy", dtype: torch.dtype, version: int) -> int:
        """Take over the policy's weights, in `dtype`, as `version`; returns how many tensors there were. Collective.

        Raises:
            UserError: the engine has parameters that the policy has nothing for.
        """

    def abort(self) -> None:
        """Let go of everything that is being generated, for nobody will use it."""

    def metrics(self) -> dict[str, float]:
        """What has happened since it was asked last, of this rank; counts."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
