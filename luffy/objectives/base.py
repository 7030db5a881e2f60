"""What an objective is.

    choose, rollouts    the traces of a problem that it is shown, and what to sample beside them
    prefixes, again     beginnings of traces that rollouts go on from, at once or where none was right
    terms               of the groups of one update, graded: which rows enter the model, their advantages, losses and
                        weights, and what the sum is divided by
    weigh               where `looks`: what depends on the policy's own log-probs or entropies, per micro-batch
    judged              what networks beside the policy say something of, before `terms`
    recall, observe     where an objective remembers: answers of earlier steps that join a step's groups; what it
                        keeps of a step
    extra               updates of their own after those of a step

Losses are summed over tokens. What they are divided by is known before the first backward: of the whole update,
whatever the micro-batches and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from luffy.sections import Section

if TYPE_CHECKING:
    from luffy_kernels.token_losses import TokenLoss
    from torch import Tensor

    from luffy.data import Example
    from luffy.groups import Group, Row
    from luffy.objectives.choice import Known
    from luffy.objectives.looking import Seen
    from luffy.packing import MicroBatch


class Options(Section):
    """What every objective may be told; one's own come in a subclass."""

    name: str
    """Of the objective: one of the catalogue, or MODULE:CLASS."""

    @property
    def sampled(self) -> int:
        """Rollouts of a problem that has as many traces as are wanted."""
        return 0

    @property
    def shown(self) -> int:
        """Traces of such a problem."""
        return 0

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of those that are needed beside the policy, see `luffy.networks`."""
        return ("reference",) if getattr(self, "kl_coef", 0.0) else ()

    @property
    def compares(self) -> bool:
        """Whether a loss compares stored tokens with the probability that who wrote them gave them."""
        return False


@dataclass(slots=True, kw_only=True)
class Terms:
    """An update, as an objective wants it."""

    groups: list[Group]
    rows: list[list[Row]]
    """Of each group, those whose gradient is not zero by construction. The others never enter the model."""
    normalizer: float
    """What the summed loss is divided by."""
    entropy_coef: float
    """In units of that sum."""
    kl_coef: float = 0.0
    """Likewise, of the estimate k3 of the divergence from the reference policy."""
    extra: bool = False
    """Beside a step's groups, and beside the schedule of the learning rate."""


class Objective:
    """Sums over rows of a group that `assign` describes; see the module."""

    Options: ClassVar[type[Options]] = Options
    looks: ClassVar[Literal["nothing", "logp", "entropy"]] = "nothing"
    """What of the policy's `weigh` needs, in a pass of its own before an update's: a third more arithmetic."""

    tries: int = 0
    """How often `again` is asked."""

    corrects: ClassVar[bool] = False
    """Whether `weigh` weighs by how far the policy is from who sampled; `luffy.correction` would do so again."""

    recalls: ClassVar[bool] = False
    """Whether `recall` may put stored answers into a step's groups."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.losses: tuple[TokenLoss, ...] = self.token_losses()

    def token_losses(self) -> tuple[TokenLoss, ...]:
        """Indexed by a row's `loss_id`."""
        raise NotImplementedError

    def rollouts(self, traces: int) -> int:
        """To sample for a problem that is shown so many traces; one that lacks some gets a rollout for each."""
        return self.options.sampled + self.options.shown - traces

    def choose(self, example: Example, known: Known) -> list[int]:
        """Numbers of the traces of a problem that join its group. The same where the same is known."""
        from luffy.objectives.choice import choose

        return choose(example, self.options, known) if self.options.shown else []

    def may_choose(self, example: Example) -> list[int]:
        """All that `choose` may give, whatever is known."""
        from luffy.objectives.choice import may_choose

        return may_choose(example, self.options) if self.options.shown else []

    def prefixes(self, example: Example, known: Known) -> list[tuple[int, int]]:
        """(number of a trace, its first tokens) that as many of the rollouts of a problem are to begin with."""
        return []

    def again(self, group: Group, number: int) -> list[tuple[int, int]]:
        """As `prefixes`, of rollouts in place of a graded group's; []: it stays. number: of the try, from 0."""
        return []

    def prepare(self, examples: list[Example]) -> None:
        """Look at the training data, once.

        Raises:
            UserError: they lack what the objective learns from.
        """
        if self.options.shown:
            from luffy.objectives.choice import refuse_without

            refuse_without(examples, self.options)

    def assign(self, group: Group, progress: float) -> list[Row]:
        """Fill `advantage`, `loss_id` and `weight` of the rows, rewards being known; returns those that enter the
        model. progress: the share of the run's steps that is over."""
        raise NotImplementedError

    def counted(self, group: Group) -> list[Row]:
        """Rows that the loss is a mean over, where it is one: also those that `assign` leaves out because their
        gradient is zero."""
        return group.rows

    def terms(self, groups: list[Group], progress: float) -> Terms:
        """Of the groups of one update, of all ranks. Divides as `GroupOptions` says; without them by the tokens."""
        rows = [self.assign(group, progress) for group in groups]
        entering = [row for found in rows for row in found]
        counted = [row for group in groups for row in self.counted(group)]
        tokens = sum(row.num_targets for row in counted)
        chosen = getattr(self.options, "normalizer", "tokens")
        if chosen == "sequences":
            for row in entering:
                row.weight /= row.num_targets
        normalizer = float({"tokens": tokens, "sequences": len(counted)}[chosen] if isinstance(chosen, str) else chosen)
        normalizer = normalizer or 1.0
        # where there is an entropy bonus or a KL term every row enters the model, and so do those that are imitated
        per_token = normalizer / max(sum(row.num_targets for row in entering), 1)
        return Terms(
            groups=groups,
            rows=rows,
            normalizer=normalizer,
            entropy_coef=getattr(self.options, "entropy_coef", 0.0) * per_token,
            kl_coef=getattr(self.options, "kl_coef", 0.0) * per_token,
        )

    def judged(self, group: Group) -> list[Row]:
        """Rows of a graded group that the networks beside the policy say something of; at least those of `assign`."""
        return group.rows

    def extra(self, groups: list[Group], progress: float) -> list[Terms]:
        """Updates of their own after those of a step. groups: the step's, of all ranks."""
        return []

    def scored(self, example: Example) -> int:
        """Tokens after a problem's prompt of what the engine is asked to score, at most."""
        chosen = getattr(self.options, "trace_choice", "first")
        return max(map(len, example.traces), default=0) if chosen in ("likely", "unlikely") else 0

    def hint(self, example: Example) -> str | None:
        """A text for the end of the question, given which the engine scores the chosen traces: their `behaviour`."""
        return None

    def skips(self, index: int, prompts: int) -> bool:
        """Whether the stream passes over this example of the training data. prompts: of a step."""
        return False

    def recall(self, prompts: int, seed: int) -> list[tuple[int, list[Row]]]:
        """(number of the example, stored answers of which one joins its rollouts) for fewer than `prompts` questions of
        the step that begins. The same on every rank."""
        return []

    def pick(self, rows: list[Row], entropies: list[float]) -> Row:
        """Which of several answers that were recalled. entropies: of each, the policy's, summed over its tokens."""
        return rows[0]

    def observe(self, groups: list[Group]) -> None:
        """The groups of a step, of all ranks, after its updates."""

    def metrics(self) -> dict[str, float]:
        """What is said of a step beside what `luffy.metrics` does."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs to go on: tensors [...] of any shape on the CPU, which nobody changes. Saved with a
        checkpoint, by one rank."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from the `state`, tensors [...], that an objective of the same options gave."""

    def weigh(self, micro: MicroBatch, seen: Seen) -> None:
        """Change `token_weight` and `advantages`, [N] float32 each, of a micro-batch by what the policy itself says.
        Where ranks share its tokens, all of them are here."""
