"""What a training step is made of: groups of rows.

A group is one prompt with everything that answers it: rollouts sampled from the policy and traces of a stronger model.
A row is one answer, as token ids from sampling to the loss; nothing is decoded and encoded again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from luffy.data import Example
from luffy.rollout.engine import Span

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, kw_only=True)
class Row:
    """One answer to a group's prompt.

    `token_ids` ends with the EOS when the answer is finished. `sampler_logp` are the engine's log-probs of the same
    tokens (nats; empty for a trace), `versions` which weights sampled them. The objective fills `advantage`, `loss_id`
    and `weight`, which multiplies the policy loss of its tokens.

    `is_trace`: it is stored, of a stronger model (`teacher`) or of an earlier step. `behaviour`: log-probs of its
    tokens under who wrote it, where they are known and a loss compares with them.

    `prefix`: so many tokens at the beginning were given, of a trace, and the rest was sampled after them;
    `sampler_logp` has NaN for them. `prefix_weight` multiplies their `weight`, and with 0 no loss sees them;
    `prefix_loss` stands in place of their `loss_id`.

    `advantages`: [n] float32 where they differ from token to token, and `advantage` is their mean. `returns`: [n]
    float32, what a network that is trained beside the policy should have said of the tokens.

    `said`: name of a network beside the policy (`luffy.networks`) -> [n] float32, what it says of the tokens.
    """

    token_ids: tuple[int, ...]
    text: str
    is_trace: bool = False
    finished: bool = True
    sampler_logp: tuple[float, ...] = ()
    versions: tuple[Span, ...] = ()
    reward: float = 0.0
    verdict: str = ""
    advantage: float = 0.0
    loss_id: int = 0
    weight: float = 1.0
    teacher: str = ""
    behaviour: tuple[float, ...] = ()
    prefix: int = 0
    prefix_loss: int = 0
    prefix_weight: float = 1.0
    advantages: Tensor | None = None
    returns: Tensor | None = None
    said: dict[str, Tensor] = field(default_factory=dict)

    @property
    def unlearned(self) -> int:
        """Tokens at the beginning that a loss does not see."""
        return 0 if self.prefix_weight else self.prefix

    @property
    def num_targets(self) -> int:
        """Tokens that a loss sees."""
        return len(self.token_ids) - self.unlearned

    @property
    def solved(self) -> bool:
        """Partial credit of a grader is a reward, not a solution."""
        return self.reward >= 1


@dataclass(slots=True, kw_only=True)
class Group:
    """A prompt and its answers."""

    example: Example
    rows: list[Row] = field(default_factory=list)
    position: int = -1
    """Of its prompt in the stream (`luffy.data.batches`); -1: it is no prompt of the stream."""
    index: int = -1
    """Of its example in the training data."""

    @property
    def traces(self) -> list[Row]:
        """Rows that nobody sampled for this group."""
        return [row for row in self.rows if row.is_trace]
