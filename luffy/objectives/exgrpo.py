"""ExGRPO: learning to reason from one's own experience (arXiv 2510.02245; its published settings).

Right answers are kept by question. Up to `replayed` of a step's prompts are questions that have some: one of those
answers joins the rollouts, counted in the group's mean. The others are fresh prompts.

    rollouts   -A pi/pi_old, A = reward - mean(group); until the start with PPO's clip
    replayed   -A r/(r + beta), r = pi/pi_past, gradient to log p: -A beta r/(r + beta)^2

pi_past: the engine's probability when the answer was sampled. Nothing is kept or replayed before a step whose share of
right answers exceeds `start`. A question is drawn by its bucket, the number of right ones among its newest rollouts:
buckets weigh as a Gaussian, whatever their sizes. Of its answers the one that the policy, as it is now, has the lowest
mean entropy on is replayed. A question whose rollouts are all right is retired, and no longer drawn while a step has
enough others.

The published code differs from the paper, and from this, in two ways that can be asked for: `total_entropy` is near to
what its misplaced mask selects by (the sum, so short answers are preferred), and `count_replays` counts the replayed
answer among the right ones, one bucket too high.

State: the answers with their log-probs, buckets, retired questions, whether it has started; saved with a checkpoint.
Criterion: the mean reward of rollouts rises.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from luffy.objectives.grpo import Grpo, RatioOptions
from luffy.objectives.replay import Replay
from luffy.sections import NonNegative, Positive
from luffy.seeds import derive

if TYPE_CHECKING:
    from luffy_kernels.token_losses import TokenLoss
    from torch import Tensor

    from luffy.groups import Group, Row

CLIPPED, ROLLOUT, REPLAYED = 0, 1, 2


class ExGrpo(Grpo):
    class Options(RatioOptions):
        name: Literal["exgrpo"] = "exgrpo"
        normalizer: Positive | Literal["tokens", "sequences"] = 65536.0
        entropy_coef: NonNegative = 0.001
        clip_low: Positive | None = 0.2
        clip_high: Positive | None = 0.2
        beta: Positive = 0.1
        """Shaping of replayed tokens: r / (r + beta)."""
        replayed: Annotated[float, Field(ge=0, lt=1)] = 0.5
        """Share of a step's prompts that may be replayed questions."""
        start: Annotated[float, Field(ge=0, lt=1)] = 0.35
        """Share of right answers in a step after which answers are kept and replayed, and the clip is gone."""
        bucket_mean: Annotated[float, Field(ge=0, le=1)] = 0.5
        """Share of right rollouts that questions are most likely replayed at."""
        bucket_std: Positive = 1.0
        """Width of the Gaussian over buckets, right answers."""
        replay_choice: Literal["entropy", "total_entropy", "random"] = "entropy"
        """Which of a question's answers: the lowest mean entropy of a token, the lowest sum of them, or any."""
        kept: PositiveInt | None = None
        """Newest answers of a question that are kept; null: all, as published."""
        count_replays: bool = False
        """A replayed answer counts for its question's bucket, as in the published code."""

        @property
        def compares(self) -> bool:
            return True

    recalls: ClassVar = True

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.replay = Replay(options.rows, kept=options.kept, count_replays=options.count_replays)
        self.started = False

    def token_losses(self) -> tuple[TokenLoss, ...]:
        from luffy_kernels.token_losses import policy_gradient, shaped

        return (*super().token_losses(), policy_gradient(), shaped(self.options.beta, "old"))

    def prepare(self, examples: list) -> None:
        self.questions = len(examples)

    def skips(self, index: int, prompts: int) -> bool:
        return index in self.replay.retired and self.questions - len(self.replay.retired) > prompts

    def recall(self, prompts: int, seed: int) -> list[tuple[int, list[Row]]]:
        o = self.options
        most = int(o.replayed * prompts)
        drawn = self.replay.draw(most, seed, o.bucket_mean * o.rows, o.bucket_std)
        found = [(index, self.replay.answers[index]) for index in drawn]
        if o.replay_choice == "random":
            at = [derive(seed, index) % len(answers) for index, answers in found]
            found = [(index, answers[n : n + 1]) for n, (index, answers) in zip(at, found, strict=True)]
        return [(index, [answer.row() for answer in answers]) for index, answers in found]

    def pick(self, rows: list[Row], entropies: list[float]) -> Row:
        total = self.options.replay_choice == "total_entropy"
        scores = [h if total else h / len(row.token_ids) for row, h in zip(rows, entropies, strict=True)]
        return rows[scores.index(min(scores))]

    def assign(self, group: Group, progress: float) -> list[Row]:
        for row in group.rows:
            row.loss_id = REPLAYED if row.is_trace else ROLLOUT if self.started else CLIPPED
        return super().assign(group, progress)

    def observe(self, groups: list[Group]) -> None:
        solved = [row.solved for group in groups for row in group.rows]
        self.started = self.started or (bool(solved) and fmean(solved) > self.options.start)
        if self.started:
            for group in groups:
                self.replay.add(group)

    def metrics(self) -> dict[str, float]:
        r = self.replay
        answers = sum(map(len, r.answers.values()))
        found = {"started": self.started, "questions": len(r.answers), "answers": answers, "retired": len(r.retired)}
        return {f"replay/{name}": float(value) for name, value in found.items()}

    def state(self) -> dict[str, Tensor]:
        import torch

        return self.replay.state() | {"started": torch.tensor([self.started])}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.replay.load_state(state)
        self.started = bool(state["started"][0])
