"""Advantages and row rules: luffy_spec-style groups, every number known by hand."""

import pytest

from luffy.advantages import group_advantages
from luffy.config import ObjectiveConfig
from luffy.data import Example
from luffy.data.problem import Problem
from luffy.groups import Group, Row
from luffy.objectives import make_objective


def example(num_traces: int = 1) -> Example:
    problem = Problem(
        id="p", data_source="s", messages=({"role": "user", "content": "?"},), answer="1", traces=(), extra={}
    )
    return Example(problem, (1, 2, 3), tuple((4, 5, i) for i in range(num_traces)))


def group(rollout_rewards, trace_reward=None) -> Group:
    rows = [Row(token_ids=(7, 2), text="", reward=r) for r in rollout_rewards]
    if trace_reward is not None:
        rows.append(Row(token_ids=(4, 5, 2), text="", reward=trace_reward, is_trace=True))
    return Group(example=example(trace_reward is not None), rows=rows)


@pytest.mark.parametrize("k", range(8))
def test_luffy_advantages_with_k_of_seven_right_and_a_right_trace(k):
    g = group([1.0] * k + [0.0] * (7 - k), 1.0)
    kept = make_objective(ObjectiveConfig(name="luffy", entropy_coef=0.0)).assign(g)
    if k == 7:
        assert kept == []
        assert all(row.advantage == 0 for row in g.rows)
        return
    assert kept == g.rows
    for row in g.rows:
        assert row.advantage == pytest.approx((7 - k) / 8 if row.reward else -(k + 1) / 8)


@pytest.mark.parametrize("k", range(8))
def test_a_trace_that_fails_the_verifier_is_never_pushed_up(k):
    g = group([1.0] * k + [0.0] * (7 - k), 0.0)
    make_objective(ObjectiveConfig(name="luffy")).assign(g)
    assert g.traces[0].advantage == pytest.approx(-k / 8)


def test_luffy_gives_traces_the_shaped_loss_and_rollouts_the_ratio():
    objective = make_objective(ObjectiveConfig(name="luffy", gamma=0.3))
    g = group([0.0] * 7, 1.0)
    objective.assign(g)
    assert [row.loss_id for row in g.rows] == [0] * 7 + [1]
    assert objective.losses[0].name == "policy_gradient"
    assert objective.losses[1].name == "shaped"
    assert objective.losses[1].constant == 0.3


@pytest.mark.parametrize(
    ("name", "with_trace", "without"), [("luffy", (7, 1), (8, 0)), ("grpo", (8, 0), (8, 0)), ("sft", (0, 1), (0, 0))]
)
def test_a_missing_trace_becomes_a_rollout(name, with_trace, without):
    objective = make_objective(ObjectiveConfig(name=name, rows=8))
    for ex, want in ((example(2), with_trace), (example(0), without)):
        assert (objective.num_rollouts(ex), objective.num_traces(ex)) == want


def test_rows_without_gradient_stay_out_unless_an_entropy_bonus_reaches_them():
    for coef, want in ((0.0, 0), (0.001, 8)):
        objective = make_objective(ObjectiveConfig(name="grpo", entropy_coef=coef))
        assert len(objective.assign(group([1.0] * 8))) == want


def test_sft_imitates_wrong_traces_unless_told_to_filter():
    for wanted, filtered in ((1, False), (0, True)):
        objective = make_objective(ObjectiveConfig(name="sft", trace_filter=filtered))
        assert len(objective.assign(group([], 0.0))) == wanted
    assert len(make_objective(ObjectiveConfig(name="sft", trace_filter=True)).assign(group([], 1.0))) == 1


def test_scales_make_the_entropy_bonus_a_token_mean():
    normalizer, coef = make_objective(ObjectiveConfig(normalizer=8192.0, entropy_coef=0.01)).scales(400, 16)
    # loss = (... - coef * sum ent) / normalizer
    assert coef / normalizer == pytest.approx(0.01 / 400)
    assert make_objective(ObjectiveConfig(name="sft")).scales(400, 16) == (400.0, 0.0)
    for name, count in (("tokens", 400.0), ("sequences", 16.0)):
        normalizer, coef = make_objective(ObjectiveConfig(normalizer=name, entropy_coef=0.01)).scales(400, 16)
        assert (normalizer, coef) == (count, pytest.approx(0.01 * count / 400))


def test_standard_deviation_only_when_asked_for():
    assert group_advantages([1.0, 0.0]) == [0.5, -0.5]
    assert group_advantages([1.0, 0.0], divide_by_std=True) == pytest.approx(
        [0.5 / 0.5**0.5, -0.5 / 0.5**0.5], rel=1e-4
    )
    assert group_advantages([0.3] * 3, divide_by_std=True) == [0.0] * 3
    assert group_advantages([]) == []
