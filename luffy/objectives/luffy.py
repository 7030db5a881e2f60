"""LUFFY: learning to reason under off-policy guidance (arXiv 2504.14945; its published recipe).

A group is rollouts and traces of stronger models, verified like the rollouts and counted in the group's mean. Rollout
tokens: -A pi/pi_old. Trace tokens, their behaviour probability taken as 1 (eq. 6):

    -A f(p),  f(p) = p / (p + gamma),  gradient to log p: -A gamma p / (p + gamma)^2

A problem that lacks traces gets a rollout for each instead. A trace that fails the verifier has reward 0 and hence a
non-positive advantage: it is pushed down, as published. `on_policy` and `off_policy` are the published code's reshapes:

    shaped  x / (x + gamma)    ratio  x    logp  w log x    p_logp  x + w log x    square_root  x^0.5    pow  x^a

of x = p for traces and x = pi/pi_old for rollouts, whose `shaped` is f(p) / f(p_old) and whose `logp` has w = 1. Where
the data have the teachers' log-probs (`luffy data score`) traces may be compared with them:

    teacher  p / (q + 1e-6)    shaped_teacher  r / (r + gamma), r = p / q    q: the teacher's probability of it

the former as in the published code (use_off_policy_probs), the latter as the paper writes its eq. 6 before it takes q
as 1. Traces without them keep q = 1.

Of the published code's options these are left out: traces that rollouts go on from (`prefix_rft` and `uft` do that), an
entropy coefficient that adapts, its other estimates of a KL term (`kl_coef` has k3), and those it declares and never
uses.

Criterion: the mean reward of rollouts rises.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from luffy.errors import UserError
from luffy.objectives.grpo import Grpo
from luffy.objectives.guided import GuidedOptions
from luffy.sections import Fraction, NonNegative, Positive
from luffy.seeds import derive

if TYPE_CHECKING:
    from luffy_kernels.token_losses import TokenLoss

    from luffy.data import Example
    from luffy.groups import Group, Row
    from luffy.objectives.base import Terms
    from luffy.objectives.choice import Known

ROLLOUT, TRACE, COMPARED = 0, 1, 2
GPUS, PUBLISHED = 8, 8 * 8192.0
Reshape = Literal["shaped", "ratio", "logp", "p_logp", "square_root", "pow"]


def where(rising: Callable[[float], float], value: float | None) -> float | None:
    """The x > 0 at which a rising function has a value: by bisection of log x, within e^+-60."""
    if value is None:
        return None
    low, high = -60.0, 60.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(math.exp(middle)) < value else (low, middle)
    return math.exp(high)


class Luffy(Grpo):
    class Options(GuidedOptions):
        name: Literal["luffy"] = "luffy"
        normalizer: Positive | Literal["tokens", "sequences"] = 65536.0
        entropy_coef: NonNegative = 0.001
        gamma: Positive = 0.1
        """Shaping of trace tokens: f(p) = p / (p + gamma); of rollouts too where `on_policy` is "shaped"."""
        on_policy: Reshape = "ratio"
        """What the advantage of a rollout's token multiplies."""
        off_policy: Reshape | Literal["teacher", "shaped_teacher"] = "shaped"
        """What the advantage of a trace's token multiplies."""
        logp_weight: Positive = 0.1
        """w."""
        exponent: Positive = 0.5
        """a."""
        trace_min: float | None = None
        """Smallest value of a trace's reshaped x whose token has a gradient (off_policy_min_clip, which the published
        code applies after its reshape); null: none."""
        trace_max: float | None = None
        """Largest one (off_policy_max_clip)."""
        p_max: Positive | None = None
        """Tokens of any row whose p exceeds it have no gradient (all_max_clip); null: none."""
        trace_rate: Fraction = 1.0
        """How often a problem that is drawn is shown its traces (sample_target_ratio)."""
        trace_weight: Positive = 1.0
        """Of traces' advantages (prefix_reward_weight_alpha)."""
        rollout_weight: Positive = 1.0
        """Of rollouts' (prefix_reward_weight_beta)."""
        learn_cut: bool = True
        """false: rollouts that the token limit cut off have advantage 0 (disable_truncation_advantage)."""

        parity: bool = False
        """Divide as the published code does on its 8 GPUs: the policy loss by 8192 on each, whose gradients are
        averaged; the entropy bonus is a mean over each of the micro-batches of 32768 tokens, and these add up."""

        @property
        def compares(self) -> bool:
            return self.off_policy in ("teacher", "shaped_teacher")

        @model_validator(mode="after")
        def _one_divisor(self) -> Self:
            if self.parity and "normalizer" in self.model_fields_set and self.normalizer != PUBLISHED:
                raise ValueError(f"normalizer is {PUBLISHED:.0f} with parity; leave one of them out")
            return self

    def token_losses(self) -> tuple[TokenLoss, ...]:
        from luffy_kernels import token_losses as t

        o = self.options
        clips: dict[str, Any] = {"clip_low": o.clip_low, "clip_high": o.clip_high, "p_max": o.p_max}
        reshape = {
            "shaped": lambda x: x / (x + o.gamma),
            "shaped_teacher": lambda x: x / (x + o.gamma),
            "logp": lambda x: o.logp_weight * math.log(x),
            "p_logp": lambda x: x + o.logp_weight * math.log(x),
            "square_root": math.sqrt,
            "pow": lambda x: x**o.exponent,
        }

        def bounded(name: str) -> dict[str, Any]:
            """The bounds of what it makes of x, as bounds of x."""
            of = partial(where, reshape.get(name, lambda x: x))
            return {"x_min": of(o.trace_min), "x_max": of(o.trace_max), "p_max": o.p_max}

        rollout = {
            "ratio": lambda: t.policy_gradient(**clips),
            "shaped": lambda: t.shaped_relative(o.gamma, **clips),
            "logp": lambda: t.log_prob(1.0, "old", **clips),
            "p_logp": lambda: t.prob_plus_log(o.logp_weight, "old", **clips),
            "square_root": lambda: t.power(0.5, "old", **clips),
            "pow": lambda: t.power(o.exponent, "old", **clips),
        }
        trace = {
            "ratio": lambda: t.power(1.0, "prob", **bounded("ratio")),
            "shaped": lambda: t.shaped(o.gamma, "prob", **bounded("shaped")),
            "logp": lambda: t.log_prob(o.logp_weight, "prob", **bounded("logp")),
            "p_logp": lambda: t.prob_plus_log(o.logp_weight, "prob", **bounded("p_logp")),
            "square_root": lambda: t.power(0.5, "prob", **bounded("square_root")),
            "pow": lambda: t.power(o.exponent, "prob", **bounded("pow")),
        }
        compared = {
            "teacher": lambda: t.behaviour_ratio(1e-6, **bounded("teacher")),
            "shaped_teacher": lambda: t.shaped(o.gamma, "old", **bounded("shaped_teacher")),
        }
        if o.compares:
            return rollout[o.on_policy](), trace["shaped"](), compared[o.off_policy]()
        return rollout[o.on_policy](), trace[o.off_policy]()

    def choose(self, example: Example, known: Known) -> list[int]:
        shown = random.Random(derive(known.seed, "shown")).random() < self.options.trace_rate
        return super().choose(example, known) if shown else []

    def prepare(self, examples: list[Example]) -> None:
        super().prepare(examples)
        shown = [example for example in examples if self.may_choose(example)]
        scored = sum(any(example.trace_logps[at] for at in self.may_choose(example)) for example in shown)
        if self.options.compares and not scored:
            raise UserError(
                f"objective: off_policy {self.options.off_policy!r} compares with the teacher, and of {len(shown)} "
                f"problems with traces none has its log-probs (target_logps); run luffy data score, or take shaped"
            )

    def assign(self, group: Group, progress: float) -> list[Row]:
        for row in group.rows:
            row.loss_id = ROLLOUT if not row.is_trace else COMPARED if row.behaviour else TRACE
        super().assign(group, progress)
        for row in group.rows:
            row.weight = self.options.trace_weight if row.is_trace else self.options.rollout_weight
            if not (row.finished or row.is_trace or self.options.learn_cut):
                row.advantage = 0.0
        return self.alive(group.rows)

    def terms(self, groups: list[Group], progress: float) -> Terms:
        terms = super().terms(groups, progress)
        if self.options.parity:
            rows = [row for group in groups for row in group.rows]
            tokens = sum(len(group.example.prompt_ids) * len(group.rows) for group in groups)
            tokens += sum(len(row.token_ids) for row in rows)
            terms.normalizer = PUBLISHED
            micro_batches = math.ceil(tokens / GPUS / 32768)
            responses = max(1, sum(len(row.token_ids) for row in rows))
            # sum / normalizer * coefficient = entropy_coef * micro-batches * mean entropy
            terms.entropy_coef = self.options.entropy_coef * micro_batches * PUBLISHED / responses
        return terms
