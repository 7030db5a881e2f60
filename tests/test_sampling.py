"""A step's prompts: none lost, none twice; what is cut off goes on; verdicts while others are being sampled."""

import json
import threading
import time
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_train import arguments, records
from test_weight_sync import trainer_logp
from tiny import luffy, make_model, make_policy

from luffy import optim
from luffy.config import OptimConfig, RolloutConfig, TrainConfig, config_of
from luffy.data import Example, Ledger, Problem, Stream
from luffy.errors import UserError
from luffy.objectives import make_objective
from luffy.rewards.pool import Verdict
from luffy.rollout.engine import Completion, Request, Span, generate
from luffy.rollout.vllm_engine import VllmEngine
from luffy.sampling import COUNTED, Sampler, done
from luffy.train import check_engine

MOST = 8


class Scripted:
    """An engine that answers one token of every request a call, until the prompt's first number of tokens is reached;
    a prompt that ends with 0 is answered wrong."""

    version = 0

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def awake(self):
        return nullcontext()

    def begin(self, requests, temperature):
        self.asked += requests
        return Steps(self, list(requests))


class Steps:
    def __init__(self, engine, requests) -> None:
        self.version, self.left = engine.version, dict(enumerate(requests))
        self.tokens = dict.fromkeys(self.left, 0)

    @property
    def waiting(self) -> int:
        return len(self.left)

    def answer(self, index: int) -> list[Completion]:
        request, size = self.left[index], self.tokens[index]
        done = len(request.prompt) - 3 + size >= request.prompt[0]  # an EOS; else the limit
        ids = tuple(request.prompt[2] for _ in range(size))
        return [Completion(ids, (-0.5,) * size, done, (Span(self.version, 0, size),))] * request.count

    def take(self, timeout: float):
        time.sleep(0.001)
        found = []
        for index, request in list(self.left.items()):
            self.tokens[index] += 1
            if (
                len(request.prompt) - 3 + self.tokens[index] >= request.prompt[0]
                or self.tokens[index] == request.max_tokens
            ):
                found.append((index, self.answer(index)))
                del self.left[index]
        return found

    def stop(self):
        return {index: self.answer(index) if self.tokens[index] else [] for index in self.left}


class Verifier:
    """Right where the text has a 1; takes its time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.when = seconds, []

    def grade(self, pairs):
        time.sleep(self.seconds)
        self.when.append(time.monotonic())
        return [Verdict(float("1" in text), "ok") for text, _ in pairs]


class AtOnce:
    """Grades then and there, so that what is cut off does not depend on threads."""

    def submit(self, grade, work):
        return done(grade(work))

    def shutdown(self, **_):
        pass


def trainer(examples, *, prompts: int, verifier=None, rank: int = 0, ranks: int = 1, objective="grpo", **rollout):
    config = config_of(objective)(
        rollout=RolloutConfig(max_tokens=MOST, **rollout),
        objective={"rows": 2},
        train=TrainConfig(prompts_per_step=prompts),
    )
    share = lambda items: items[rank::ranks]  # noqa: E731
    return SimpleNamespace(
        config=config,
        engine=Scripted(),
        world=SimpleNamespace(rank=rank, size=ranks, share=share),
        examples=examples,
        objective=make_objective(config.objective),
        template=SimpleNamespace(decode=lambda ids: "".join(map(str, ids))),
        verifier=verifier or Verifier(),
    )


def example(number: int, length: int, word: int = 1, trace: int = 0) -> Example:
    problem = Problem(id=str(number), messages=[{"role": "user", "content": "?"}], answer="1", data_source="s")
    return Example(problem, (length, number, word), [tuple([5] * trace)] if trace else [])


def a_step(sampler: Sampler):
    return sampler.batch(1, lambda name: nullcontext())


def names(batch) -> list[int]:
    return [group.position for group in batch.groups]


def begun(number: int, trace: tuple[int, ...], word: int = 0, length: int = 6) -> Example:
    return Example(example(number, length, word).problem, (length, number, word), (trace,) if trace else ())


def test_rollouts_go_on_from_the_beginning_of_a_trace():
    trace = (4, 4, 4, 4, 9)
    t = trainer([begun(0, trace, word=1), begun(1, (), word=1)], prompts=2, objective="prefix_rft")
    with Sampler(t, Ledger(Stream(2, 2, seed=0))) as sampler:
        groups = a_step(sampler).groups
    for group in groups:
        several = [row.prefix for row in group.rows]
        assert several == ([4, 0] if group.example.traces else [0, 0]), (
            "never all of a trace: the last token is the EOS"
        )
        for row in group.rows:
            assert row.token_ids[: row.prefix] == trace[: row.prefix]
            assert row.token_ids[row.prefix :] == (1,) * (6 - row.prefix)
            assert [x != x for x in row.sampler_logp] == [True] * row.prefix + [False] * (6 - row.prefix)
            assert row.versions == (Span(0, row.prefix, 6),)
            assert not row.is_trace
            assert row.reward == 1.0
    asked = {request.prompt: request for request in t.engine.asked}
    assert asked[(6, 0, 1, 4, 4, 4, 4)].max_tokens == MOST - 4
    assert asked[6, 0, 1].count == 1
    assert asked[6, 1, 1].count == 2


class Scores(Scripted):
    """Scores a token by its id and its place, so that who reads another place reads another number."""

    def score(self, sequences):
        self.scored = sequences
        return [[-ids[at] - at / 100 for at in range(1, len(ids))] for ids in sequences]


def hinted(tokens: int):
    """SORT's sampler of one problem, whose teacher's log-probs the data have; (trainer, its group)."""
    problem = Problem(id="0", messages=[{"role": "user", "content": "?"}], answer="1", data_source="s")
    one = Example(problem, (2, 0, 1), ((7, 8, 9),), trace_logps=((-0.7, -0.7, -0.7),))
    t = trainer([one], prompts=1, objective="sort")
    t.objective.options.plan_tokens = tokens
    t.engine = Scores()
    # a letter is a token
    t.template.encode_prompt = lambda turns: [ord(c) for c in turns[-1]["content"]]
    with Sampler(t, Ledger(Stream(1, batch_size=1, seed=0))) as sampler:
        [group] = a_step(sampler).groups
    return t, group


def test_a_trace_is_scored_after_the_question_and_the_plan():
    t, group = hinted(64)
    [sequence] = t.engine.scored
    question = "?\n\nThe answer is 1."
    assert list(sequence) == [*map(ord, question), 7, 8, 9]
    [trace] = group.traces
    begin = len(question)
    assert trace.behaviour == pytest.approx([-7 - begin / 100, -8 - (begin + 1) / 100, -9 - (begin + 2) / 100])


def test_a_trace_whose_plan_is_too_long_is_compared_with_nobody():
    t, group = hinted(2)
    assert not hasattr(t.engine, "scored")
    assert group.traces[0].behaviour == ()


def test_a_prefix_leaves_a_token_of_the_longest_answer():
    t = trainer([begun(0, (4,) * 50, length=40)], prompts=1, objective="prefix_rft")
    with Sampler(t, Ledger(Stream(1, 1, seed=0))) as sampler:
        [group] = a_step(sampler).groups
    assert [(row.prefix, len(row.token_ids)) for row in group.rows] == [(MOST - 1, MOST), (0, MOST)]


def test_what_nobody_solves_is_tried_again_from_further_along_a_trace():
    solved_at = {0: (1, 0, 0, 0, 0, 0, 0, 9), 1: (0, 0, 0, 0, 1, 0, 0, 9), 2: (0, 0, 0, 0, 0, 0, 0, 1), 3: ()}
    t = trainer([begun(n, trace) for n, trace in solved_at.items()], prompts=4, objective="bread")
    with Sampler(t, Ledger(Stream(4, 4, seed=0))) as sampler:
        batch = a_step(sampler)
    groups = {group.index: group for group in batch.groups}
    assert {n: [row.prefix for row in group.rows] for n, group in groups.items()} == {
        0: [4, 4],  # a half; then it is solved
        1: [6, 6],  # three quarters
        2: [7, 7],  # seven eighths, and still wrong
        3: [0, 0],  # nothing to begin with
    }
    assert [groups[n].rows[0].solved for n in range(4)] == [True, True, False, False]
    assert batch.counts["batch/tried_again"] == 3 + 2 + 1
    assert [group.position for group in batch.groups] == [0, 1, 2, 3]
    seeds = [request.seed for request in t.engine.asked]
    assert len(set(seeds)) == len(seeds), "no try draws what another one has drawn"


def test_a_step_has_its_prompts_in_order_with_all_their_answers():
    t = trainer([example(i, 1 + i % 5) for i in range(12)], prompts=4)
    ledger = Ledger(Stream(12, 4, seed=3))
    with Sampler(t, ledger) as sampler:
        for step in range(3):
            batch = a_step(sampler)
            assert names(batch) == list(range(4 * step, 4 * step + 4))
            for group in batch.groups:
                assert group.example is t.examples[ledger.stream.index(group.position)]
                assert [len(row.token_ids) for row in group.rows] == [group.example.prompt_ids[0]] * 2
            ledger.use(names(batch))
    assert (ledger.low, ledger.beyond) == (12, set())
    assert len({request.seed for request in t.engine.asked}) == 12


def test_traces_are_chosen_by_what_the_policy_and_the_verifier_say():
    """Likely ones by the mean log-prob of a token, over the trace's own; the verifier is asked where that is wanted."""
    lie, short, sure = (5, 5), (1, 6, 6), (1, 7, 7, 7, 7)
    problem = example(0, 3)
    problem = Example(problem.problem, problem.prompt_ids, (lie, short, sure))
    plain = example(1, 3)

    class Scoring(Scripted):
        def score(self, sequences):
            says = {5: -0.1, 6: -2.0, 7: -0.5, 1: -1.0}
            return [[-9.0] * 2 + [says[token] for token in ids[3:]] for ids in sequences]

    def chosen(**options):
        t = trainer([problem, plain], prompts=2)
        t.engine = Scoring()
        t.config = config_of("luffy")(
            rollout=t.config.rollout, objective={"rows": 3} | options, train=TrainConfig(prompts_per_step=2)
        )
        t.objective = make_objective(t.config.objective)
        with Sampler(t, Ledger(Stream(2, 2, 0))) as sampler:
            sampler._grader = AtOnce()
            groups = {group.index: group for group in a_step(sampler).groups}
        assert [len(group.rows) for group in groups.values()] == [3, 3]
        return [row.token_ids for row in groups[0].traces]

    assert chosen() == [lie]
    assert chosen(trace_choice="likely") == [lie]
    assert chosen(trace_choice="likely", trace_right=True) == [sure]  # -0.6 a token
    assert chosen(trace_choice="unlikely", traces=2) == [short, sure]
    assert chosen(trace_right=True, traces=2) == [short, sure]
    assert chosen(trace_right=True, trace_tokens=2) == []


def test_long_traces_begin_first():
    t = trainer([example(i, 2, trace=10 * (i % 3)) for i in range(6)], prompts=6)
    with Sampler(t, Ledger(Stream(6, 6, seed=3))) as sampler:
        a_step(sampler)
    traces = [
        len(t.examples[request.prompt[1]].traces[0]) if request.prompt[1] % 3 else 0 for request in t.engine.asked
    ]
    assert traces == sorted(traces, reverse=True)


def test_what_is_cut_off_goes_on_in_the_next_step_with_its_weights():
    lengths = [1, 6, 2, 12, 1, 2, 1, 2, 1, 2, 1, 2]  # one is longer than an answer may be
    stream = Stream(12, 2, seed=3)
    examples = [example(index, 0) for index in range(12)]
    for position, length in enumerate(lengths):
        index = stream.index(position)
        examples[index] = example(index, length)
    t = trainer(examples, prompts=2, oversample=2.0)
    ledger, seen, counts = Ledger(stream), [], Counter()
    with Sampler(t, ledger) as sampler:
        sampler._grader = AtOnce()
        for step in range(5):
            t.engine.version = step
            batch = a_step(sampler)
            counts += batch.counts
            ledger.use(names(batch))
            for group in batch.groups:
                seen.append(group.position)
                for row in group.rows:
                    assert len(row.token_ids) == min(MOST, lengths[group.position]) == len(row.sampler_logp)
                    assert row.finished == (lengths[group.position] <= MOST)
                    assert row.versions[0].begin == 0
                    assert row.versions[-1].end == len(row.token_ids)
                    assert all(a.end == b.begin for a, b in zip(row.versions, row.versions[1:], strict=False))
                    versions = [span.version for span in row.versions]
                    assert versions == sorted(set(versions))
                    assert versions[-1] <= step
                    assert (len(versions) > 1) == (group.position in (1, 3))
    assert len(seen) == len(set(seen)) == 10
    assert {1, 3} <= set(seen)  # the long ones were not starved
    assert counts["rollout/answers_cut"] >= 4
    assert len({r.seed for r in t.engine.asked}) == len(t.engine.asked)


def test_answers_that_are_too_long_do_not_hold_up_a_step():
    """Carried on with and cut off at the limit, they are answers like others."""
    stream = Stream(24, 2, seed=3)
    examples = [example(index, 0) for index in range(24)]
    for position in range(24):
        examples[stream.index(position)] = example(stream.index(position), 1 if position < 3 else 50)
    t, ledger, seen = trainer(examples, prompts=2, oversample=3.0), Ledger(stream), []
    with Sampler(t, ledger) as sampler:
        sampler._grader = AtOnce()
        for _ in range(4):
            batch = a_step(sampler)
            assert len(batch.groups) == 2
            ledger.use(names(batch))
            seen += names(batch)
    assert len(seen) == len(set(seen)) == 8


def test_groups_without_a_signal_are_replaced_within_bounds():
    stream = Stream(40, 4, seed=3)
    examples = [example(index, 0) for index in range(40)]
    for position in range(40):
        index = stream.index(position)
        examples[index] = example(index, 2, word=int(position % 4 == 3))  # three of four prompts: all rows wrong
    t = trainer(examples, prompts=4, refill=5)
    # a right answer among wrong ones: the signal
    grade = lambda pairs: [Verdict(float("1" in text and n == 0), "ok") for n, (text, _) in enumerate(pairs)]  # noqa: E731
    t.verifier.grade = grade
    ledger = Ledger(stream)
    with Sampler(t, ledger) as sampler:
        batch = a_step(sampler)
        assert len(batch.groups) == 4
        assert batch.counts["batch/refills"] == 5
        signals = [any(row.reward for row in group.rows) for group in batch.groups]
        assert sum(signals) == 3  # of 4, 3, 3, 2, 1 and 1 prompts, every fourth: the bound holds
        assert sorted([*names(batch), *batch.given_up]) == list(range(14))
        ledger.use([*names(batch), *batch.given_up])
        assert ledger.low == 14
        assert min(names(a_step(sampler))) >= 14


def test_two_ranks_share_a_step_and_the_ledger_has_them_all():
    examples = [example(i, 1 + i % 4) for i in range(20)]
    ledger = Ledger(Stream(20, 5, seed=3))
    synced = [0, 0]

    def rank_of(rank: int) -> Sampler:
        def before() -> None:
            synced[rank] += 1  # collective: ranks do it in every step, or one waits for the other

        return Sampler(trainer(examples, prompts=5, rank=rank, ranks=2, oversample=2.0), ledger, before)

    samplers, seen = [rank_of(rank) for rank in range(2)], []
    for step in range(3):
        batches = [a_step(sampler) for sampler in samplers]
        assert synced == [step + 1] * 2
        assert all(set(batch.counts) == set(COUNTED) for batch in batches)
        assert [len(batch.groups) for batch in batches] == [3, 2]
        ledger.use(found := [position for batch in batches for position in names(batch)])
        seen += found
    assert len(seen) == len(set(seen)) == 15
    assert ledger.low + len(ledger.beyond) == 15


def test_verdicts_come_while_others_are_being_sampled():
    t = trainer([example(i, 1 if i % 2 else 8) for i in range(6)], prompts=6, verifier=Verifier(0.01))
    last = []
    stepping = Steps.take

    def slow(self, timeout):
        time.sleep(0.02)
        last.append(time.monotonic())
        return stepping(self, timeout)

    with pytest.MonkeyPatch.context() as patched, Sampler(t, Ledger(Stream(6, 6, seed=3))) as sampler:
        patched.setattr(Steps, "take", slow)
        a_step(sampler)
    assert sum(when < last[-1] for when in t.verifier.when) >= 3
    assert threading.active_count() < 20


def test_an_engine_with_other_weights_ends_the_run():
    wrong = {"rollout/staleness_max": 0.0, "rollout/logp_gap_mean": 0.6}
    with pytest.raises(UserError, match=r"differ from the trainer's by 0.60 nats a token"):
        check_engine(wrong)
    check_engine(wrong | {"rollout/staleness_max": 1.0})  # the policy has moved: nothing is known
    check_engine(wrong | {"rollout/logp_gap_mean": 0.02})
    check_engine({"rollout/logp_gap_mean": None})  # nothing was sampled


def test_only_what_samples_can_be_refilled():
    for given in ({"oversample": 1.5}, {"refill": 1}):
        with pytest.raises(ValueError, match="needs an objective and an engine that sample"):
            config_of("sft")(rollout=RolloutConfig(**given))


def test_vllm_in_this_process_gives_back_what_it_has_when_it_is_stopped(tmp_path):
    """And goes on from there with other weights: each token has the log-prob of the weights that sampled it."""
    path = str(make_model(tmp_path / "model"))
    policy = make_policy(path)
    prompts = [tuple(5 + (3 * i + j) % 90 for j in range(20)) for i in range(3)]
    with VllmEngine(
        path, RolloutConfig(kv_cache_gib=0.25), dtype="float32", eos_token_id=2, max_model_len=256
    ) as engine:
        requests = [Request(prompt, 2, tokens, 7) for prompt, tokens in zip(prompts, (4, 200, 200), strict=True)]
        generation = engine.begin(requests, 1.0)
        [(first, short)] = generation.take(60)
        assert (first, generation.waiting) == (0, 2)
        assert [len(answer.token_ids) for answer in short] == [4, 4] or any(answer.finished for answer in short)
        left = generation.stop()
        assert sorted(left) == [1, 2]
        assert generation.waiting == 0
        assert engine.llm.llm_engine.has_unfinished_requests() is False
        optimizer = optim.make_optimizer(policy, OptimConfig(lr=0.02))
        before = [trainer_logp(policy, prompts[1] + answer.token_ids)[19:] for answer in left[1]]
        for param in policy.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
        engine.sync(policy, torch.float32, version=1)
        for answer, want in zip(left[1], before, strict=True):
            assert 3 <= len(answer.token_ids) < 200
            torch.testing.assert_close(torch.tensor(answer.logp), want, atol=1e-3, rtol=0)
            [[more]] = generate(engine, [Request(prompts[1] + answer.token_ids, 1, 9, 5)], 1.0)
            whole = answer.then(more)
            size = len(answer.token_ids)
            assert whole.versions == (Span(0, 0, size), Span(1, size, len(whole.token_ids)))
            want = trainer_logp(policy, prompts[1] + whole.token_ids)[19 + size :]
            torch.testing.assert_close(torch.tensor(whole.logp[size:]), want, atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "more", "happens"),
    [
        ("colocated", {"rollout__oversample": 1.5}, "rollout/answers_cut"),
        ("colocated", {"rollout__refill": 1}, "batch/groups_given_up"),
    ],
)
def test_a_run_that_begins_more_than_it_needs_loses_nothing(tmp_path, engine, more, happens):
    model = make_model(tmp_path / "model")
    given = {"rollout__engine": engine, "train__steps": 4, "train__updates_per_step": 1} | more
    given |= {"rollout__max_sequences": 7, "rollout__max_tokens": 24}  # so that prompts are not done at the same time
    given |= {"eval__every": 0, "checkpoint__every": 2, "correction__kind": "truncate"}
    done = luffy(*arguments(tmp_path / "run", model, **given), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = records(tmp_path / "run")
    assert all(set(COUNTED) <= set(record) for record in steps)
    assert sum(record[happens] for record in steps) > 0
    found = [json.loads(file.read_text()) for file in (tmp_path / "run" / "checkpoints").rglob("*.json")]
    ledgers = [state["ledger"] for state in found if isinstance(state, dict) and "ledger" in state]
    used = max(ledger["low"] + len(ledger["beyond"]) for ledger in ledgers)
    assert used == sum(4 + record["batch/groups_given_up"] for record in steps)
