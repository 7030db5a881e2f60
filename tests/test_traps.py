"""Twelve ways in which a LUFFY goes wrong unnoticed: the published code's defects, and what an implementation of the
paper must get right. Each by itself, against numbers written here."""

import math

import pytest
import torch
from luffy_kernels import linear_policy_loss
from luffy_kernels.token_losses import shaped
from test_data import Letters, problem
from test_objectives import World, centred, clipped, group, guided, make, plain, tokens
from test_sampling import AtOnce, a_step, example, trainer

from luffy.data import Ledger, Stream
from luffy.data.examples import tokenize
from luffy.groups import Group, Row
from luffy.objectives.replay import Replay
from luffy.packing import pack
from luffy.rewards import grade_boxed, grade_train
from luffy.sampling import Sampler


@pytest.mark.parametrize("k", range(8))
def test_1_the_trace_counts_in_the_mean_of_its_group(k):
    """k of 7 rollouts right, the trace right: (7 - k) / 8 for what is right, -(k + 1) / 8 for what is wrong."""
    made = group([1.0] * k + [0.0] * (7 - k), 1.0)
    make("luffy").assign(made, 0.0)
    for row in made.rows:
        assert row.advantage == pytest.approx((7 - k) / 8 if row.reward else -(k + 1) / 8)


@pytest.mark.parametrize("p", [1e-3, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("advantage", [0.875, -0.125])
def test_2_the_gradient_of_the_shaped_loss(p, advantage):
    """To the logits: -A gamma p / (p + gamma)^2 (onehot - softmax). At p = gamma it is largest, not at p = 1."""
    others = torch.tensor([0.4, 0.3, 0.2, 0.1]) * (1 - p)
    logits = torch.cat([torch.tensor([p]), others]).log()[None].requires_grad_()
    loss = linear_policy_loss(
        logits,
        torch.eye(5),
        torch.tensor([0]),
        old_logp="current",
        advantages=torch.tensor([advantage]),
        losses=(shaped(0.1),),
        loss_id=torch.tensor([0]),
        normalizer=1.0,
    ).loss
    [got] = torch.autograd.grad(loss, logits)

    at, step = [float(x) for x in logits.detach().double()[0]], 1e-6

    def value(z: list[float]) -> float:
        q = math.exp(z[0]) / sum(map(math.exp, z))
        return -advantage * q / (q + 0.1)

    for n in range(5):
        ahead, behind = ([x + sign * step * (m == n) for m, x in enumerate(at)] for sign in (1, -1))
        numeric = (value(ahead) - value(behind)) / (2 * step)
        formula = -advantage * 0.1 * p / (p + 0.1) ** 2 * ((n == 0) - math.exp(at[n]))
        assert float(got[0, n]) == pytest.approx(numeric, rel=1e-4, abs=1e-7)
        assert numeric == pytest.approx(formula, rel=1e-5)


def test_3_the_sum_is_divided_by_a_constant_and_never_averaged():
    """Other groups change no token's gradient; another constant does by what it is."""
    [one, *more] = guided().groups
    alone = World([one]).gradients(make("luffy"))
    among = World([one, *more]).gradients(make("luffy"))
    half = World([one]).gradients(make("luffy", normalizer=131072.0))
    for token, value in alone.items():
        assert among[token] == pytest.approx(value)
        assert half[token] == pytest.approx(value / 2)


def test_4_a_trace_row_is_the_trace_through_its_eos():
    """Nothing is generated behind it, all of it is off-policy, and where there is none a rollout takes its place."""
    t = trainer([example(0, 3, trace=4), example(1, 3)], prompts=2)
    t.objective = make("luffy", rows=4)
    with Sampler(t, Ledger(Stream(2, 2, 0))) as sampler:
        sampler._grader = AtOnce()
        groups = {g.index: g for g in a_step(sampler).groups}
    assert [row.is_trace for row in groups[0].rows] == [False] * 3 + [True]
    assert [row.is_trace for row in groups[1].rows] == [False] * 4
    [trace] = groups[0].traces
    assert trace.token_ids == t.examples[0].traces[0]
    assert sum(request.count for request in t.engine.asked) == 7
    [micro] = pack([groups[0]], lambda g: g.rows, 1000)
    assert int(micro.is_trace.sum()) == len(trace.token_ids)
    assert micro.targets[micro.is_trace].tolist() == list(trace.token_ids)
    assert micro.num_targets == tokens(groups[0].rows)


@pytest.mark.parametrize("k", range(8))
def test_5_a_trace_that_fails_the_verifier_is_never_pushed_up(k):
    made = group([1.0] * k + [0.0] * (7 - k), 0.0)
    make("luffy").assign(made, 0.0)
    assert made.traces[0].advantage == pytest.approx(-k / 8)


def test_6_training_and_evaluation_grade_differently():
    """Training wants the end of the think block and no box; evaluation wants the box."""
    assert grade_train("<think>\nso x is 57.", "57") == 0.0
    assert grade_train("<think>\nhm</think>so x is 57.", "57") == 1.0
    assert grade_boxed("<think>\nhm</think>so x is 57.", "57") == 0.0


def test_7_without_traces_and_with_its_clip_it_is_dr_grpo():
    options = {"clip_low": 0.2, "clip_high": 0.2, "entropy_coef": 0.0}
    w = plain()
    w.expect(
        make("luffy", **options),
        lambda g, row, token: clipped(centred(g, row), math.exp(w.now[token] - w.old[token]), 0.2, 0.2) / 65536,
    )
    assert w.gradients(make("luffy", **options)) == w.gradients(make("dr_grpo", entropy_coef=0.0))


def test_8_an_answer_that_was_cut_off_counts_to_its_last_token_and_the_eos_is_learned():
    """Also where the EOS is what others pad with: there is no padding that it could be mistaken for."""
    eos = pad = 2
    finished = Row(token_ids=(7, 8, eos), text="", reward=1.0)
    cut = Row(token_ids=(7, 9, pad, 9), text="", finished=False)
    made = Group(example=example(0, 3), rows=[finished, cut])
    make("luffy").assign(made, 0.0)
    [micro] = pack([made], lambda g: g.rows, 1000)
    assert sorted(micro.targets.tolist()) == sorted([*finished.token_ids, *cut.token_ids])
    assert bool((micro.token_weight == 1).all())
    assert bool(micro.advantages.abs().gt(0).all())


def test_9_answers_are_chosen_for_replay_by_the_mean_entropy_of_a_token():
    """Not by a sum, which prefers what is short; that can be asked for."""
    short, long = Row(token_ids=(1, 2), text=""), Row(token_ids=tuple(range(20)), text="")
    unsure, sure = 2 * 0.9, 20 * 0.3
    assert make("exgrpo").pick([short, long], [unsure, sure]) is long
    assert make("exgrpo", replay_choice="total_entropy").pick([short, long], [unsure, sure]) is short


def test_10_a_stored_answer_is_its_tokens_and_never_its_text():
    """A set of characters stripped off the end makes "the " of "the node", and new tokens would not be those that the
    stored log-probs are of."""
    text = "the node<|end|>"
    ids, logp = tuple(map(ord, text)), tuple(-0.25 * n for n in range(len(text)))
    made = group([0.0, 0.0, 0.0])
    made.rows[0] = Row(token_ids=ids, text=text, reward=1.0, sampler_logp=logp)
    replay = Replay(3)
    replay.add(made)
    again = Replay(3)
    again.load_state(replay.state())
    [stored] = again.answers[made.index]
    assert (stored.row().token_ids, stored.row().behaviour) == (ids, logp)


def test_11_an_update_without_a_trace_is_no_nan():
    """The likelihood beside RL is a mean over the update's trace tokens, of which there may be none; and one over a
    micro-batch's was 0 / 0 in the published code (here `test_normalisation.py`, batch `few`)."""
    w = plain()
    w.expect(
        make("rl_sft", entropy_coef=0.0),
        lambda g, row, token: -centred(g, row) * math.exp(w.now[token] - w.old[token]) / 65536,
    )
    assert all(map(math.isfinite, w.gradients(make("rl_sft")).values()))


def test_12_a_trace_that_is_too_long_is_left_out_and_counted_never_cut():
    given = [problem("a", traces=("abcdefgh",)), problem("b", traces=("ab",))]
    examples, report = tokenize(given, Letters(), max_prompt_tokens=20, max_trace_tokens=5)
    assert [len(found.traces) for found in examples] == [0, 1]
    assert (report.traces_too_long, report.on_policy_only) == (1, 1)
    assert "1 too long" in str(report)
