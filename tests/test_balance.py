"""Who computes what: nothing lost, the budget held, the same plan on every rank, and ranks that finish together."""

import copy
import random
import time

import pytest
import torch
from test_packing import group

from bench import packing as bench
from luffy.balance import Unit, _exchange, bin_cost, critical_cost, plan
from luffy.flops import attention_weight
from luffy.packing import pack
from luffy.shapes import find_shape

WEIGHT = attention_weight(find_shape("qwen2.5-7b"))


def groups_of(*lengths: tuple[int, list[int]]):
    """Groups of (tokens of the prompt, tokens of each row); no two rows have a token in common."""
    ids = iter(range(1, 10**9))
    return [
        group([next(ids) for _ in range(prompt)], *[[next(ids) for _ in range(n)] for n in rows])
        for prompt, rows in lengths
    ]


def random_case(seed: int):
    rng = random.Random(seed)
    longest = rng.choice([1, 3, 40, 200])
    lengths = [
        (rng.randint(1, 30), [rng.randint(1, longest) for _ in range(rng.randint(0, 13))])
        for _ in range(rng.randint(0, 12))
    ]
    if seed % 3 == 0:  # some far beyond any budget
        lengths.append((rng.randint(1, 30), [rng.randint(1, 900) for _ in range(3)]))
    return groups_of(*lengths), rng.choice([1, 25, 120, 400]), rng.randint(1, 9), rng.choice([0.0, 1e-3, 0.1])


def rows(group):
    return group.rows


@pytest.mark.parametrize("seed", range(60))
def test_every_row_is_packed_once_within_the_budget_and_in_step(seed):
    groups, budget, ranks, weight = random_case(seed)
    packed = [pack(groups, rows, budget, rank=r, ranks=ranks, attention_weight=weight) for r in range(ranks)]
    assert len({len(micros) for micros in packed}) == 1
    micros = [micro for mine in packed for micro in mine]
    targets = torch.cat([micro.targets for micro in micros]).tolist() if micros else []
    assert sorted(targets) == sorted(token for g in groups for row in g.rows for token in row.token_ids)
    for micro in micros:
        sequences = sum(max(1, len(segment.rows)) for segment in micro.layout.segments)
        assert micro.num_tokens <= budget or sequences == 1
    if not targets:
        assert not micros


@pytest.mark.parametrize("seed", range(60))
def test_rows_keep_their_prompts(seed):
    """The token before a row's first target is its own prompt's last; positions go on from there."""
    groups, budget, ranks, weight = random_case(seed)
    ends = {row.token_ids[0]: g.example.prompt_ids for g in groups for row in g.rows}
    for rank in range(ranks):
        for micro in pack(groups, rows, budget, rank=rank, ranks=ranks, attention_weight=weight):
            for target, source in zip(micro.targets.tolist(), micro.source.tolist(), strict=True):
                before, position = micro.token_ids[source].item(), micro.positions[source].item()
                if target in ends:
                    assert (before, position) == (ends[target][-1], len(ends[target]) - 1)
                else:
                    assert before == target - 1


@pytest.mark.parametrize("seed", range(0, 60, 4))
def test_plans_of_equal_arguments_are_equal(seed):
    """As on ranks that got the groups by mail: the same plan, which leaves what it was given as it was."""
    groups, budget, ranks, weight = random_case(seed)
    mailed, before = copy.deepcopy(groups), copy.deepcopy(groups)

    def content(slots):
        return [[[(u.prompt_ids, [r.token_ids for r in u.rows]) for u in units] for units in slot] for slot in slots]

    first = content(plan(groups, rows, budget, ranks, weight))
    assert (
        first
        == content(plan(mailed, rows, budget, ranks, weight))
        == content(plan(groups, rows, budget, ranks, weight))
    )
    assert groups == before


def test_ranks_without_work_get_one_token_and_no_target():
    [[busy], [first], [second]] = (pack(groups_of((3, [5])), rows, 100, rank=rank, ranks=3) for rank in range(3))
    assert busy.num_targets == 5
    for idle in (first, second):
        assert (idle.token_ids.tolist(), idle.positions.tolist(), idle.num_targets) == ([0], [0], 0)
        [segment] = idle.layout.segments
        assert (segment.start, segment.end, segment.is_plain) == (0, 1, True)
        for name in ("source", "targets", "advantages", "loss_id", "is_trace", "sampler_logp"):
            assert getattr(idle, name).shape == (0,)
            assert getattr(idle, name).dtype == getattr(busy, name).dtype


def test_no_rows_no_micro_batches():
    for groups in ([], groups_of((4, []), (2, []))):
        assert [pack(groups, rows, 10, rank=rank, ranks=4) for rank in range(4)] == [[], [], [], []]


@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_cost_counts_what_the_mask_lets_through(seed):
    groups, budget, ranks, _ = random_case(seed)
    for slot in plan(groups, rows, budget, ranks, 0.1):
        for units in slot:
            if not units or sum(unit.tokens for unit in units) > 600:
                continue
            micro = pack([group(u.prompt_ids, *[r.token_ids for r in u.rows]) for u in units], rows, 10**6)[0]
            segment, row = micro.layout.labels(torch.device("cpu"))
            at = torch.arange(micro.num_tokens)
            visible = (at[:, None] >= at) & (segment[:, None] == segment) & ((row == 0) | (row[:, None] == row))
            assert sum(unit.tokens for unit in units) == micro.num_tokens
            assert sum(unit.pairs for unit in units) == visible.sum().item()
            assert bin_cost(units, 0.5) == pytest.approx(micro.num_tokens + 0.5 * visible.sum().item())


@pytest.mark.parametrize("ranks", [2, 8, 32])
@pytest.mark.parametrize(("lengths", "budget"), [("gsm8k", 4096), ("gsm8k", 32768), ("r1", 16384), ("r1", 32768)])
def test_realistic_batches_keep_the_bounds(lengths, budget, ranks):
    make = {"gsm8k": lambda rng: bench.gsm8k(rng, bench.gsm8k_pairs(None)), "r1": bench.r1}[lengths]
    batches = [bench.groups_of(make(random.Random(seed))) for seed in (11, 12)]
    found = bench.measure("ours", batches, budget, ranks, WEIGHT)
    assert found["real"] >= 0.98
    assert found["rank"] <= 1.03
    assert found["step"] <= 1.03
    tokens = max(bench.least(groups).tokens for groups in batches)
    assert found["micros"] <= -(-tokens * 1.2 // (budget * ranks))


def test_attention_is_balanced_only_where_it_weighs():
    """Eight long sequences beside sixty-four short ones of as many tokens in all: equal tokens are not equal cost."""
    groups = groups_of(*[(1, [800])] * 8, *[(1, [100])] * 64)
    for weight in (0.0, 0.01):
        totals = [
            sum(bin_cost(slot[rank], weight) for slot in plan(groups, rows, 100_000, 3, weight)) for rank in range(3)
        ]
        assert max(totals) <= 1.03 * sum(totals) / 3
    by_tokens = plan(groups, rows, 100_000, 3, 0.0)
    assert critical_cost(by_tokens, 0.01) > 1.03 * sum(bin_cost(units, 0.01) for units in by_tokens[0]) / 3


def test_long_rows_meet_in_one_slot():
    groups = groups_of((1, [800] * 2), *[(1, [20])] * 100)
    slots = plan(groups, rows, 1000, 2)
    assert critical_cost(slots, 0.0) <= 1.03 * sum(bin_cost(units, 0.0) for slot in slots for units in slot) / 2


def test_totals_are_even_where_slots_are_not():
    """No two of these fit together: 90 beside 80 and then 70 beside 60, so whoever had 90 gets 60."""
    slots = plan(groups_of(*[(1, [n]) for n in (90, 80, 70, 60)]), rows, 100, 2)
    assert [[sum(unit.tokens for unit in units) for units in slot] for slot in slots] == [[90, 80], [60, 70]]


@pytest.mark.parametrize("seed", range(30))
def test_exchanges_keep_rows_and_budget_and_lower_the_higher_cost(seed):
    rng = random.Random(seed)
    high, low = (
        [
            Unit(tuple(range(5)), g.rows, n)
            for n, g in enumerate(groups_of(*[(5, [rng.randint(1, n) for _ in range(3)])] * 3))
        ]
        for n in (40, 20)
    )
    weight = 0.05
    low, high = sorted((high, low), key=lambda units: bin_cost(units, weight))
    budget = max(sum(unit.tokens for unit in units) for units in (high, low))
    before = [bin_cost(units, weight) for units in (high, low)]
    pair = _exchange(high, low, budget, weight)
    if pair is None:
        assert max(before) < 1.2 * min(before)
        return
    count = sorted(len(row.token_ids) for units in (high, low) for unit in units for row in unit.rows)
    assert sorted(len(row.token_ids) for units in pair for unit in units for row in unit.rows) == count
    assert max(bin_cost(units, weight) for units in pair) < max(before)
    assert all(sum(unit.tokens for unit in units) <= budget for units in pair)


def test_no_exchange_breaks_the_budget():
    """The long row's neighbour has no room, though it is the cheaper one: attention makes the long row dear."""
    high, low = (
        [Unit(g.example.prompt_ids, g.rows, n) for n, g in enumerate(groups_of(*lengths))]
        for lengths in ([(1, [79]), (1, [16])], [(1, [16])] * 6)
    )
    assert bin_cost(high, 0.1) > 1.5 * bin_cost(low, 0.1)
    pair = _exchange(high, low, 100, 0.1)
    assert pair is None or all(sum(unit.tokens for unit in units) <= 100 for units in pair)
    assert _exchange(high, low, 112, 0.1) is not None


def test_one_rank_places_units_first_fit():
    groups = groups_of((10, [21, 21]), (10, [11]), (10, [31]), (10, [61, 61]))
    slots = plan(groups, rows, 100)
    assert [[(u.group, len(u.rows), u.tokens) for u in units] for [units] in slots] == [
        [(3, 1, 70), (1, 1, 20)],
        [(3, 1, 70)],
        [(0, 2, 50), (2, 1, 40)],
    ]


def test_as_few_slots_as_the_budget_allows():
    """Seven of 100 as four and three, not as two, two, two and one: no slot more where it does not pay."""
    assert len(plan(groups_of(*[(1, [100])] * 7), rows, 400, 2)) == 1
    assert len(plan(groups_of(*[(1, [100])] * 7), rows, 399, 2)) == 2  # two ranks hold three each


def test_rows_of_one_token_do_not_repeat_their_prompt():
    slots = plan(groups_of((30, [1] * 11), (30, [1] * 5)), rows, 100, 4)
    assert sum(unit.tokens for slot in slots for units in slot for unit in units) == 60


def test_rows_that_only_fit_alone_are_not_left_to_the_end():
    """Ten rows over half the budget and as many short ones as fill the rest, in ten micro-batches."""
    groups = groups_of(*[(1, [60, *[10] * 3]) for _ in range(10)])
    slots = plan(groups, rows, 100, 5)
    assert len(slots) == 2
    assert max(sum(unit.tokens for unit in units) for slot in slots for units in slot) <= 100


def test_a_thousand_rows_for_32_ranks_take_well_under_a_second():
    groups = bench.groups_of(bench.r1(random.Random(3)))
    began = time.process_time()
    plan(groups, rows, 32768, 32, WEIGHT)
    assert time.process_time() - began < 1


def test_wrong_arguments_are_named():
    groups = groups_of((2, [3]))
    with pytest.raises(ValueError, match="rank must be one of 2 ranks, counted from 0, got 2"):
        pack(groups, rows, 10, rank=2, ranks=2)
    with pytest.raises(ValueError, match="budget must be a positive number of tokens, got 0"):
        pack(groups, rows, 0)
    with pytest.raises(ValueError, match="at least one token"):
        pack([group([1], [])], rows, 10)


def test_a_unit_counts_the_prompt_once():
    unit = Unit((1, 2, 3), groups_of((3, [4, 1]))[0].rows)
    assert unit.tokens == 3 + 3
    assert unit.pairs == 6 + (3 * 3 + 6)


def test_the_bench_compares_and_fails_where_a_bound_is_missed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "PROMPTS", 16)
    out = tmp_path / "packing.json"
    arguments = ["--ranks", "2", "--batches", "1", "--out", str(out)]
    assert bench.main(arguments) == 0
    text = capsys.readouterr().out
    assert all(text.count(way) == 2 for way in bench.WAYS if way != "ours")
    assert '"of_ideal"' in out.read_text()
    monkeypatch.setattr(bench, "REAL", 1.01)
    assert bench.main(arguments) == 1
    assert "expected at least 101%" in capsys.readouterr().out
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "1"}\n')
    for wrong, text in ((["--gsm8k", str(bad)], "question and answer"), (["--ranks", "0"], "positive")):
        with pytest.raises(SystemExit):
            bench.main(wrong)
        assert text in capsys.readouterr().err


def test_padding_is_counted_as_computed():
    groups = groups_of((1, [10]), (1, [4]))
    [[work]] = bench.padded(groups, 100, 1, 0.0)
    assert work == (20, 2 * 55)
    assert bench.figures([[work]], bench.least(groups), 0.0)["real"] == 14 / 20
