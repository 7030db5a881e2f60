"""LUFFY: learning to reason under off-policy guidance (arXiv 2504.14945; its published recipe and options).

A group is rollouts and traces of stronger models, verified like the rollouts and counted in the group's mean. Rollout
tokens: -A pi/pi_old. Trace tokens, their behaviour probability taken as 1 (eq. 6):

    -A f(p),  f(p) = p / (p + gamma),  gradient to log p: -A gamma p / (p + gamma)^2

A problem that lacks traces gets a rollout for each instead. A trace that fails the verifier has reward 0 and hence a
non-positive advantage: it is pushed down, as published. `on_policy` and `off_policy` are the published code's reshapes:

    shaped  x / (x + gamma)    ratio  x    logp  w log x    p_logp  x + w log x    square_root  x^0.5    pow  x^a

of x = p for traces and x = pi/pi_old for rollouts, whose `shaped` is f(p) / f(p_old) and whose `logp` has w = 1.

Criterion: the mean reward of rollouts rises, on problems that no rollout solves at first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from luffy.objectives.grpo import Grpo
from luffy.objectives.guided import GuidedOptions
from luffy.sections import NonNegative, Positive

if TYPE_CHECKING:
    from luffy_kernels.token_losses import TokenLoss

    from luffy.groups import Group, Row

ROLLOUT, TRACE = 0, 1
Reshape = Literal["shaped", "ratio", "logp", "p_logp", "square_root", "pow"]


class Luffy(Grpo):
    class Options(GuidedOptions):
        name: Literal["luffy"] = "luffy"
        normalizer: Positive | Literal["tokens", "sequences"] = 65536.0
        entropy_coef: NonNegative = 0.001
        gamma: Positive = 0.1
        """Shaping of trace tokens: f(p) = p / (p + gamma); of rollouts too where `on_policy` is "shaped"."""
        on_policy: Reshape = "ratio"
        """What the advantage of a rollout's token multiplies."""
        off_policy: Reshape = "shaped"
        """What the advantage of a trace's token multiplies."""
        logp_weight: Positive = 0.1
        """w."""
        exponent: Positive = 0.5
        """a."""
        trace_min: Positive | None = None
        """Smallest p of a trace's token that has a gradient (off_policy_min_clip); null: none."""
        trace_max: Positive | None = None
        """Largest one (off_policy_max_clip)."""
        p_max: Positive | None = None
        """Tokens of any row whose p exceeds it have no gradient (all_max_clip); null: none."""

    def token_losses(self) -> tuple[TokenLoss, ...]:
        from luffy_kernels import token_losses as t

        o = self.options
        clips: dict[str, Any] = {"clip_low": o.clip_low, "clip_high": o.clip_high, "p_max": o.p_max}
        bounds: dict[str, Any] = {"x_min": o.trace_min, "x_max": o.trace_max, "p_max": o.p_max}
        rollout = {
            "ratio": lambda: t.policy_gradient(**clips),
            "shaped": lambda: t.shaped_relative(o.gamma, **clips),
            "logp": lambda: t.log_prob(1.0, "old", **clips),
            "p_logp": lambda: t.prob_plus_log(o.logp_weight, "old", **clips),
            "square_root": lambda: t.power(0.5, "old", **clips),
            "pow": lambda: t.power(o.exponent, "old", **clips),
        }
        trace = {
            "ratio": lambda: t.power(1.0, "prob", **bounds),
            "shaped": lambda: t.shaped(o.gamma, "prob", **bounds),
            "logp": lambda: t.log_prob(o.logp_weight, "prob", **bounds),
            "p_logp": lambda: t.prob_plus_log(o.logp_weight, "prob", **bounds),
            "square_root": lambda: t.power(0.5, "prob", **bounds),
            "pow": lambda: t.power(o.exponent, "prob", **bounds),
        }
        return rollout[o.on_policy](), trace[o.off_policy]()

    def assign(self, group: Group, progress: float) -> list[Row]:
        for row in group.rows:
            row.loss_id = TRACE if row.is_trace else ROLLOUT
        return super().assign(group, progress)
