"""Recorded rollouts: a run from them is the run that left them, without an engine."""

import json
from contextlib import nullcontext

import pytest
import torch
from test_train import arguments, records, without_times
from tiny import luffy, make_model, sample

from luffy.config import Config, RolloutConfig
from luffy.errors import UserError
from luffy.rollout.engine import Completion, Span
from luffy.rollout.replay import Recorder, Replay, Told


class Fixed:
    """An engine that answers with the seed."""

    version = 3

    def awake(self):
        return nullcontext()

    def begin(self, requests, temperature):
        return Told(
            [
                [Completion((r.seed, n), (-0.5, -0.25), n % 2 == 0, (Span(3, 0, 2),)) for n in range(r.count)]
                for r in requests
            ]
        )


ASK = {"temperature": 0.7, "max_tokens": 5}


def test_what_was_sampled_is_found_by_prompt_and_seed(tmp_path):
    recorder = Recorder(Fixed(), tmp_path / "rollouts" / "rank-0.jsonl")
    prompts = [(1, 2), (1, 2)]
    want = sample(recorder, prompts, [2, 3], seeds=[7, 8], **ASK)
    sample(recorder, [(1, 2)], [1], seeds=[10], **ASK)
    engine = Replay(tmp_path / "rollouts", version=3)
    assert sample(engine, prompts, [2, 3], seeds=[7, 8], **ASK) == want
    assert sample(engine, [(1, 2)], [1], seeds=[8], **ASK) == [want[1][:1]]
    assert engine.sync(None, torch.float32, 4) == 0
    assert engine.version == 4
    assert sample(engine, [(1, 2)], [1], seeds=[7], **ASK)[0][0].versions == (Span(3, 0, 2),)  # as it was


def test_what_was_not_sampled_is_refused(tmp_path):
    file = tmp_path / "r.jsonl"
    sample(Recorder(Fixed(), file), [(1, 2)], [2], seeds=[7], **ASK)
    file.write_text(file.read_text() + '{"prompt": [1')  # a kill
    engine = Replay(tmp_path)
    for prompts, count, seed, changes, words in (
        ([(1, 2)], 2, 8, {}, "no answers to a prompt of 2 tokens with seed 8; it was recorded with other data"),
        ([(1, 2)], 3, 7, {}, "has 2 answers to a prompt, and 3 are asked for"),
        ([(1, 2)], 2, 7, {"temperature": 1.0}, "was recorded with temperature 0.7, asked for 1.0"),
        ([(1, 2)], 2, 7, {"max_tokens": 9}, "was recorded with max_tokens 5, asked for 9"),
    ):
        with pytest.raises(UserError, match=words):
            sample(engine, prompts, [count], seeds=[seed], **ASK | changes)
    with pytest.raises(UserError, match="cannot score other tokens"):
        engine.score([(1, 2)])
    file.write_text("no json\n" + file.read_text())
    with pytest.raises(UserError, match="line 1 of .*r.jsonl is no recorded rollout"):
        Replay(tmp_path)
    with pytest.raises(UserError, match="has no .*jsonl files; a run with rollout.record leaves them"):
        Replay(tmp_path / "nowhere")
    for given in ({"engine": "replay"}, {"replay": "somewhere"}):
        with pytest.raises(ValueError, match="need each other"):
            Config(rollout=RolloutConfig(**given))


def test_a_replayed_run_is_the_run(tmp_path):
    model = make_model(tmp_path / "model")
    first, again = tmp_path / "first", tmp_path / "again"
    done = luffy(*arguments(first, model, rollout__record="true", train__steps=2), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (first / "rollouts" / "rank-0.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 4 + 2 * (6 + 3)  # prompts of two steps, problems of two evaluations
    given = {"rollout__engine": "replay", "rollout__replay": first / "rollouts", "train__steps": 2}
    done = luffy(*arguments(again, model, **given), cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert without_times(records(again)) == without_times(records(first))
    assert " vllm\n" not in done.stderr  # the list of what was imported
