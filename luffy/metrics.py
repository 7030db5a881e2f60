"""What a step is measured by. Names and meanings follow LUFFY's logs (its `batch/`, `on_off_metrics/`, `actor/`, ...),
except that every mean is over the whole step, never a mean of micro-batch means.

`on` are rollouts, `off` are traces. Lengths are tokens, times seconds, log-probs nats.
"""

import errno
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from luffy_kernels import PolicyLoss, TokenLoss
from luffy_kernels.token_losses import encode, evaluate
from torch import Tensor

from luffy.correction import log_ratios
from luffy.distributed import World
from luffy.files import disk_errors, read_jsonl, write_text
from luffy.flops import Shape, attended_pairs, mfu, step_flops
from luffy.groups import Group, Row
from luffy.machines import peak_of
from luffy.packing import MicroBatch

SUMS = (
    *("pg_loss", "tokens", "entropy", "drift", "off_shaped", "sampled_tokens", "gap", "kl", "kl_tokens"),
    *("ratio_tokens", "ratio", "k3", "weight", "masked"),
    *(f"{side}_{what}" for side in ("on", "off") for what in ("tokens", "loss", "clipped", "prob")),
)


class MetricsLog:
    """Appends records to a JSON-lines file, which loggers read (`luffy.loggers`).

    Opening it to go on from step n forgets what followed step n; n = 0 forgets everything.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read_jsonl(path) if 0 < step >= line["step"]] if path.exists() else []
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._path = path
        self._file = path.open("ab", buffering=0)  # a write that failed leaves nothing behind for close to fail on

    def write(self, step: int, record: dict[str, Any]) -> None:
        """Non-finite numbers become null: the file stays valid JSON."""
        clean = {key: _finite(value) for key, value in record.items()}
        with disk_errors("metrics"):
            line = (json.dumps({"step": step} | clean) + "\n").encode()
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, "the disk took only a part of a line", str(self._path))

    def close(self) -> None:
        with disk_errors("metrics"):
            self._file.close()


class NoLog:
    """That of a rank which does not write."""

    def write(self, step: int, record: dict[str, Any]) -> None:
        pass


def group_metrics(groups: list[Group], updated: int) -> dict[str, float]:
    """Of the groups of a step, rewards known; `updated` rows of them enter the model."""
    rows = [row for group in groups for row in group.rows]
    on, off = [row for row in rows if not row.is_trace], [row for row in rows if row.is_trace]
    solved = [row.solved for row in rows]
    lengths = [len(row.token_ids) for row in rows]
    verdicts = [row.verdict for row in rows]
    return {
        "batch/avg_prefix_ratio": len(off) / max(len(rows), 1),
        "batch/solve_none": sum(not any(row.solved for row in group.rows) for group in groups),
        "batch/solve_all": sum(bool(group.rows) and all(row.solved for row in group.rows) for group in groups),
        "batch/solved": _mean(solved),
        "batch/failed": 1 - _mean(solved),
        "batch/on_solved": _mean([row.solved for row in on]),
        "batch/off_solved": _mean([row.solved for row in off]),
        "batch/rows": len(rows),
        "batch/zero_rows": len(rows) - updated,
        "batch/groups_without_trace": sum(not group.traces for group in groups),
        "on_off_metrics/on_response_length_mean": _mean([len(row.token_ids) for row in on]),
        "on_off_metrics/off_response_length_mean": _mean([len(row.token_ids) for row in off]),
        "on_off_metrics/on_score": _mean([row.reward for row in on]),
        "on_off_metrics/off_score": _mean([row.reward for row in off]),
        "on_off_metrics/off_on_example_ratio": len(off) / len(on) if on else math.nan,
        **_spread("critic/score", [row.reward for row in rows]),
        **_spread("critic/rewards", [row.reward for row in rows]),
        **_spread("critic/returns", [row.advantage for row in rows]),
        **_spread("critic/advantages", [row.advantage for row in rows]),
        **_spread("response_length", lengths),
        "response_length/clip_ratio": _mean([not row.finished for row in rows]),
        **_spread("prompt_length", [len(group.example.prompt_ids) for group in groups for _ in group.rows]),
        "verify/timeouts": verdicts.count("timeout"),
        "verify/crashes": verdicts.count("crash"),
        **teacher_metrics(off),
    }


def teacher_metrics(traces: list[Row]) -> dict[str, float]:
    """`traces/TEACHER/...` of every teacher that is named: how many of its traces joined the step's groups, their mean
    reward and length."""
    found = {}
    for teacher in sorted({row.teacher for row in traces if row.teacher}):
        theirs = [row for row in traces if row.teacher == teacher]
        name = re.sub(r"[^\w.-]+", "_", teacher)
        found[f"traces/{name}/count"] = float(len(theirs))
        found[f"traces/{name}/reward"] = _mean([row.reward for row in theirs])
        found[f"traces/{name}/tokens"] = _mean([len(row.token_ids) for row in theirs])
    return found


def work_metrics(
    shape: Shape,
    groups: list[list[Row]],
    prompts: list[int],
    seconds: float,
    *,
    ranks: int,
    first_pass: bool,
    frozen: bool,
) -> dict[str, float]:
    """Model FLOP of an update phase per second and rank, and of a known GPU's peak, by the formulas of `luffy.flops`.

    groups: the rows of each group that entered the model; prompts: tokens of its prompt.
    """
    inputs = [[len(row.token_ids) - 1 for row in rows] for rows in groups]
    used = [(prompt, rows) for prompt, rows in zip(prompts, inputs, strict=True) if rows]
    tokens = sum(prompt + sum(rows) for prompt, rows in used)
    pairs = sum(attended_pairs(prompt, rows) for prompt, rows in used)
    targets = count_tokens([row for rows in groups for row in rows])
    flops = step_flops(shape, tokens, pairs, targets, first_pass, frozen)
    found = {"perf/update_tflops_per_rank": flops / seconds / ranks / 1e12}
    peak = peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return found if peak is None else found | {"perf/mfu": mfu(flops, seconds, peak, ranks)}


class UpdateMetrics:
    """Token sums over the micro-batches of a step."""

    def __init__(self, losses: tuple[TokenLoss, ...], gamma: float | None) -> None:
        self.table = encode(losses)
        self.gamma = gamma
        self.sums: dict[str, float] = defaultdict(float)
        self.gap_max = 0.0
        self.log_ratio_max, self.log_ratio_min = -math.inf, math.inf
        self.num_updates = 0
        self.bad_updates = 0
        self.grad_norms: list[float] = []
        self.loss = 0.0
        self.lr = 0.0
        self.taught: dict[str, float] = {}
        """Of the networks beside the policy, as of the last update."""

    @torch.no_grad()
    def add(self, micro: MicroBatch, out: PolicyLoss, normalizer: float, first_update: bool) -> None:
        old_logp = out.logp if micro.old_logp is None else micro.old_logp
        if micro.old_logp is None:  # the step's only pass; elsewhere its first has been counted
            self.add_ratios(log_ratios(out.logp, micro.sampler_logp), torch.ones_like(out.logp))
        rows = self.table.to(out.logp.device)[micro.loss_id]
        compared = old_logp if micro.behaviour is None else micro.compared_logp
        value = evaluate(out.logp, micro.advantages, compared, rows).loss
        off, on, prob = micro.is_trace, ~micro.is_trace, out.logp.exp()
        self._sum("pg_loss", micro.token_weight * value / normalizer)
        self._sum("tokens", torch.ones_like(prob))
        self._sum("entropy", out.entropy)
        self._sum("drift", old_logp - out.logp)
        for side, mask in (("on", on), ("off", off)):
            self._sum(f"{side}_tokens", mask)
            self._sum(f"{side}_loss", value[mask])
            self._sum(f"{side}_clipped", out.clipped[mask])
            self._sum(f"{side}_prob", prob[mask])
        if micro.ref_logp is not None:
            self._sum("kl", out.kl)
            self._sum("kl_tokens", torch.ones_like(prob))
        if self.gamma is not None:
            self._sum("off_shaped", (prob / (prob + self.gamma))[off])
        if first_update:  # the weights of this pass are those that sampled, unless sampling is ahead
            gap = (out.logp - micro.sampler_logp).abs()
            sampled = ~gap.isnan()
            self._sum("sampled_tokens", sampled)
            self._sum("gap", gap[sampled])
            self.gap_max = max(self.gap_max, gap[sampled].max().item() if sampled.any() else 0.0)

    @torch.no_grad()
    def add_ratios(self, log_ratio: Tensor, weight: Tensor) -> None:
        """Trainer against sampler in the first pass of a step. [N] log ratios and weights of `luffy.correction`."""
        sampled = ~log_ratio.isnan()
        log_ratio, weight = log_ratio[sampled], weight[sampled]
        if not log_ratio.numel():
            return
        less = log_ratio.expm1()
        self._sum("ratio_tokens", sampled)
        self._sum("ratio", less + 1)
        self._sum("k3", less - log_ratio)
        self._sum("weight", weight)
        self._sum("masked", weight == 0)
        self.log_ratio_max = max(self.log_ratio_max, log_ratio.max().item())
        self.log_ratio_min = min(self.log_ratio_min, log_ratio.min().item())

    def finish_update(self, loss: float, grad_norm: float, lr: float, good: bool) -> None:
        """Close an update; one with a non-finite loss or gradient is counted apart."""
        self.loss += loss
        self.lr = lr
        self.num_updates += good
        self.bad_updates += not good
        self.grad_norms.append(grad_norm)

    def _sum(self, name: str, value: Tensor) -> None:
        assert name in SUMS, name
        self.sums[name] += value.sum(dtype=torch.float64).item()

    def reduce(self, world: World) -> None:
        """Make the sums those of all ranks: each token was counted on one of them."""
        names = sorted(SUMS)
        self.sums |= zip(names, world.sum([self.sums[name] for name in names]), strict=True)
        extremes = world.largest([self.gap_max, self.log_ratio_max, -self.log_ratio_min])
        self.gap_max, self.log_ratio_max, self.log_ratio_min = extremes[0], extremes[1], -extremes[2]

    def result(self) -> dict[str, float]:
        s = self.sums

        def mean(name: str, count: str) -> float:
            return s[name] / s[count] if s[count] else math.nan

        kl = {"actor/kl_loss": mean("kl", "kl_tokens")} if s["kl_tokens"] else {}
        return (
            kl
            | self.taught
            | {
                "actor/loss": self.loss,
                "actor/pg_loss": s["pg_loss"],
                "actor/on_pg_loss": mean("on_loss", "on_tokens"),
                "actor/off_pg_loss": mean("off_loss", "off_tokens"),
                "actor/pg_clipfrac": mean("on_clipped", "on_tokens"),
                "actor/off_pg_clipfrac": mean("off_clipped", "off_tokens"),
                "actor/ppo_kl": mean("drift", "tokens"),
                "actor/on_policy_prob": mean("on_prob", "on_tokens"),
                "actor/off_policy_prob": mean("off_prob", "off_tokens"),
                "actor/off_ratio_mean": math.nan if self.gamma is None else mean("off_shaped", "off_tokens"),
                "actor/entropy_loss": mean("entropy", "tokens"),
                "actor/grad_norm": fmean(self.grad_norms) if self.grad_norms else math.nan,
                "actor/lr": self.lr,
                "actor/updates": self.num_updates,
                "actor/bad_updates": self.bad_updates,
                "rollout/logp_gap_mean": mean("gap", "sampled_tokens"),
                "rollout/logp_gap_max": self.gap_max if s["sampled_tokens"] else math.nan,
                "rollout/ratio_mean": mean("ratio", "ratio_tokens"),
                "rollout/ratio_max": math.exp(self.log_ratio_max) if s["ratio_tokens"] else math.nan,
                "rollout/ratio_min": math.exp(self.log_ratio_min) if s["ratio_tokens"] else math.nan,
                "rollout/kl_k3": mean("k3", "ratio_tokens"),
                "rollout/weight_mean": mean("weight", "ratio_tokens"),
                "rollout/masked_fraction": mean("masked", "ratio_tokens"),
            }
        )


def count_tokens(rows: list[Row]) -> int:
    return sum(len(row.token_ids) for row in rows)


def _mean(values: list) -> float:
    return fmean(values) if values else math.nan


def _spread(name: str, values: list) -> dict[str, float]:
    if not values:
        return {}
    return {f"{name}/mean": fmean(values), f"{name}/max": float(max(values)), f"{name}/min": float(min(values))}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
