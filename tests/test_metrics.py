"""Metrics against groups whose every number is known."""

import math

import pytest
import torch
from luffy_kernels import PolicyLoss, policy_gradient, shaped
from test_objectives import example

from luffy.attention import Layout
from luffy.groups import Group, Row
from luffy.metrics import UpdateMetrics, group_metrics
from luffy.packing import MicroBatch


def group(rollout_rewards, trace_reward=None) -> Group:
    """Rollouts of two tokens, a trace of three."""
    rows = [Row(token_ids=(7, 2), text="", reward=r) for r in rollout_rewards]
    if trace_reward is not None:
        rows.append(Row(token_ids=(4, 5, 2), text="", reward=trace_reward, is_trace=True))
    return Group(example=example(trace_reward is not None), rows=rows)


def test_group_metrics():
    groups = [group([1.0, 0.0, 0.0], 1.0), group([0.0] * 4), group([1.0, 1.0, 1.0], 1.0)]
    groups[0].rows[0].finished = False
    groups[1].rows[1].verdict = "timeout"
    got = group_metrics(groups, updated=8)
    assert got["batch/avg_prefix_ratio"] == pytest.approx(2 / 12)
    assert (got["batch/solve_none"], got["batch/solve_all"]) == (1, 1)
    assert got["batch/solved"] == pytest.approx(6 / 12)
    assert got["batch/on_solved"] == pytest.approx(4 / 10)
    assert got["batch/off_solved"] == 1.0
    assert got["batch/zero_rows"] == 4
    assert got["batch/groups_without_trace"] == 1
    assert got["on_off_metrics/on_response_length_mean"] == 2
    assert got["on_off_metrics/off_response_length_mean"] == 3
    assert got["on_off_metrics/off_on_example_ratio"] == pytest.approx(0.2)
    assert got["response_length/clip_ratio"] == pytest.approx(1 / 12)
    assert (got["response_length/max"], got["response_length/min"]) == (3, 2)
    assert got["verify/timeouts"] == 1


def test_each_named_teacher_has_its_own():
    groups = [group([1.0, 0.0], 1.0), group([0.0, 0.0], 0.0), group([0.0], 1.0), group([0.0], 1.0)]
    for one, teacher in zip(groups, ("deepseek-ai/R1", "deepseek-ai/R1", "me", ""), strict=True):
        one.traces[0].teacher = teacher
    got = {name: value for name, value in group_metrics(groups, 0).items() if name.startswith("traces/")}
    assert got == {
        "traces/deepseek-ai_R1/count": 2,
        "traces/deepseek-ai_R1/reward": 0.5,
        "traces/deepseek-ai_R1/tokens": 3,
        "traces/me/count": 1,
        "traces/me/reward": 1.0,
        "traces/me/tokens": 3,
    }


def test_partial_credit_is_not_a_solution():
    got = group_metrics([group([0.5, 0.5])], updated=2)
    assert (got["batch/solved"], got["batch/solve_none"], got["critic/score/mean"]) == (0, 1, 0.5)


def test_a_side_that_is_absent_is_nan_and_not_zero():
    assert math.isnan(group_metrics([group([1.0])], 0)["batch/off_solved"])


def test_update_metrics_are_token_means_over_the_step():
    logp = torch.tensor([0.5, 0.25, 0.8, 0.1]).log()
    trace = torch.tensor([False, False, True, True])
    advantages = torch.tensor([1.0, -1.0, 0.5, 0.5])
    metrics = UpdateMetrics((policy_gradient(), shaped(0.1)), gamma=0.1)
    for part in (slice(0, 3), slice(3, 4)):  # unequal micro-batches: a mean of means would differ
        n = logp[part].numel()
        micro = MicroBatch(
            token_ids=torch.zeros(1),
            positions=torch.zeros(1),
            layout=Layout([], 0),
            source=torch.zeros(n),
            targets=torch.zeros(n),
            advantages=advantages[part],
            loss_id=trace[part].long(),
            is_trace=trace[part],
            token_weight=torch.ones(n),
            sampler_logp=torch.where(trace, torch.nan, logp + 0.01)[part],
        )
        entropy, ones = torch.full((n,), 2.0), torch.ones(n)
        out = PolicyLoss(torch.tensor(0.0), logp[part], entropy, ones, ones * 0, ones.bool() & False)
        metrics.add(micro, out, normalizer=4.0, first_update=True)
    metrics.finish_update(loss=0.3, grad_norm=2.0, lr=1e-3, good=True)
    metrics.finish_update(loss=0.1, grad_norm=4.0, lr=2e-3, good=False)
    got = metrics.result()
    assert got["actor/on_policy_prob"] == pytest.approx(0.375)
    assert got["actor/off_policy_prob"] == pytest.approx(0.45)
    assert got["actor/off_ratio_mean"] == pytest.approx((0.8 / 0.9 + 0.1 / 0.2) / 2)
    assert got["actor/on_pg_loss"] == pytest.approx((-1 + 1) / 2, abs=1e-6)
    assert got["actor/off_pg_loss"] == pytest.approx(-0.5 * (0.8 / 0.9 + 0.1 / 0.2) / 2)
    assert got["actor/entropy_loss"] == 2.0
    assert got["actor/pg_loss"] == pytest.approx(-0.5 * (0.8 / 0.9 + 0.1 / 0.2) / 4)
    assert got["actor/loss"] == pytest.approx(0.4)
    assert got["rollout/logp_gap_mean"] == pytest.approx(0.01, abs=1e-6)
    assert (got["actor/updates"], got["actor/bad_updates"], got["actor/grad_norm"]) == (1, 1, 3.0)


def test_work_is_counted_by_the_formulas_of_flops():
    from luffy.flops import attended_pairs, step_flops
    from luffy.groups import Row
    from luffy.machines import peak_of
    from luffy.metrics import work_metrics
    from luffy.shapes import KNOWN

    shape = KNOWN["qwen2.5-0.5b"]
    rows = [[Row(token_ids=(1,) * n, text="") for n in sizes] for sizes in ((5, 9), (), (3,))]
    found = work_metrics(shape, rows, [10, 100, 7], seconds=2.0, first_pass=False, ranks=4, frozen=False)
    pairs = attended_pairs(10, [4, 8]) + attended_pairs(7, [2])
    flops = step_flops(shape, 10 + 12 + 7 + 2, pairs, 17, first_pass=False)
    assert found["perf/update_tflops_per_rank"] == pytest.approx(flops / 2 / 4 / 1e12)
    found = work_metrics(shape, rows, [10, 100, 7], seconds=2.0, first_pass=False, ranks=4, frozen=True)
    flops = step_flops(shape, 10 + 12 + 7 + 2, pairs, 17, first_pass=False, frozen=True)
    assert found["perf/update_tflops_per_rank"] == pytest.approx(flops / 2 / 4 / 1e12)
    assert peak_of("NVIDIA H100 80GB HBM3") == peak_of("NVIDIA H200") == 989e12
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of("GeForce") is None
