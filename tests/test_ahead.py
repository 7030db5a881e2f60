"""Sampling ahead: in order, never further than allowed, overlapping with the update; no prompt lost or used twice."""

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time

import pytest
from test_train import arguments, records
from tiny import ROOT, luffy, make_model

from bench import async_sim
from luffy.config import Config, RolloutConfig
from luffy.groups import Group, Row
from luffy.rollout.ahead import Ahead
from luffy.rollout.client import Client
from luffy.rollout.engine import Span
from luffy.rollout.server import free_port
from luffy.train import staleness


@pytest.mark.parametrize("depth", [1, 3])
def test_steps_come_in_order_and_never_too_early(depth):
    begun, trained = [], 3
    too_early = []

    def make(step: int) -> str:
        begun.append(step)
        if step > trained + 1 + depth:
            too_early.append((step, trained))
        return f"batch {step}"

    with Ahead(make, 4, 13, depth) as ahead:
        time.sleep(0.1)
        assert begun == list(range(4, 4 + depth))  # before anybody asked
        for step in range(4, 14):
            made = ahead.next()
            assert (made.step, made.value) == (step, f"batch {step}")
            time.sleep(0.01)
            trained = step
    assert begun == list(range(4, 14))
    assert not too_early


def test_an_error_arrives_at_its_step_and_closing_begins_nothing_more():
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("step 2")
        return step

    with Ahead(make, 1, 9, 4) as ahead:
        assert ahead.next().value == 1
        with pytest.raises(ValueError, match="step 2"):
            ahead.next()
    begun = []
    with Ahead(begun.append, 1, 100, 1) as ahead:
        ahead.next()
    time.sleep(0.1)
    count = len(begun)
    time.sleep(0.2)
    assert len(begun) == count <= 3
    assert not any(thread.name == "ahead" and thread.is_alive() for thread in threading.enumerate())


def test_sampling_and_updating_overlap():
    """Five steps of 0.2 s sampling and 0.2 s update."""

    def steps(ahead) -> float:
        began = time.monotonic()
        for _ in range(5):
            ahead()
            time.sleep(0.2)
        return time.monotonic() - began

    in_turn = steps(lambda: time.sleep(0.2))
    waited = []
    with Ahead(lambda step: time.sleep(0.2), 1, 5, 1) as ahead:
        overlapped = steps(lambda: waited.append(ahead.next()))
    assert overlapped <= 0.65 * in_turn  # 1.2 s of 2
    assert all(0.19 < made.seconds < 0.4 for made in waited)


def test_staleness_is_that_of_tokens():
    rows = [
        Row(token_ids=(1, 2, 3, 4), text="", versions=(Span(5, 0, 3), Span(7, 3, 4))),
        Row(token_ids=(1, 2), text="", versions=(Span(7, 0, 2),)),
        Row(token_ids=(1,) * 50, text="", is_trace=True),
    ]
    assert staleness([Group(example=None, rows=rows)], 7) == {
        "rollout/staleness_mean": 3 * 2 / 6,
        "rollout/staleness_max": 2.0,
    }
    assert staleness([Group(example=None, rows=rows[2:])], 7) == {}


def test_only_servers_can_be_ahead():
    with pytest.raises(ValueError, match="rollout.max_staleness needs rollout.engine"):
        Config(rollout=RolloutConfig(max_staleness=1))


@pytest.mark.slow
def test_a_run_ahead_trains_on_the_same_prompts_and_is_resumed_where_it_was(tmp_path):
    model = make_model(tmp_path / "model")
    given = {"train__steps": 5, "train__updates_per_step": 1, "checkpoint__every": 0, "eval__every": 0}
    ahead = given | {"rollout__engine": "server", "rollout__max_staleness": 2, "correction__kind": "truncate"}

    def train(name: str, options: dict, *more: str) -> list[dict]:
        done = luffy(*arguments(tmp_path / name, model, *more, **options), cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return records(tmp_path / name)

    want = train("in-turn", given)
    train("ahead", ahead | {"train__max_minutes": 1e-6})
    assert len(records(tmp_path / "ahead")) == 1
    got = train("ahead", ahead, "--resume")
    for ours, theirs in zip(got, want, strict=True):
        for key in ("prompt_length/mean", "prompt_length/max", "batch/groups_without_trace"):
            assert ours[key] == theirs[key], (key, ours["step"])
        assert 0 <= ours["rollout/staleness_mean"] <= ours["rollout/staleness_max"] <= 2
        assert theirs["rollout/staleness_max"] == 0
        assert ours["trainer/idle_s"] >= 0
        assert ours["rollout/idle_s"] >= 0
    assert max(r["rollout/staleness_max"] for r in got) >= 1
    assert any(abs(r["rollout/ratio_mean"] - 1) > 1e-3 for r in got)  # older weights did sample
    text = (tmp_path / "ahead" / "timeline.json").read_text()
    events = [e for e in json.loads(text.rstrip().rstrip(",") + "]") if e["ph"] == "X"]
    assert {e["tid"] for e in events} == {1, 2}
    assert [e["name"] for e in events if e["tid"] == 2] == [f"ahead, step {n}" for n in range(1, 6)]


@pytest.fixture
def delayed_server(tmp_path):
    """A real server behind a proxy that holds answers back for 5 s; yields (model, address)."""
    model = make_model(tmp_path / "model")
    port, front = free_port(), free_port()
    log = (tmp_path / "server.log").open("w")
    serve = ["-m", "luffy.rollout.serve", "--model", str(model), "--port", str(port), "--max-model-len", "512"]
    serve += [
        "--dtype",
        "float32",
        "--kv-cache-memory-bytes",
        str(2**28),
        "--enforce-eager",
        "--no-enable-chunked-prefill",
    ]
    proxy = [str(ROOT / "tests" / "slow_proxy.py"), str(front), f"http://127.0.0.1:{port}", "5"]
    started = [
        subprocess.Popen([sys.executable, *given], stdout=log, stderr=log, start_new_session=True)
        for given in (serve, proxy)
    ]
    client = Client(f"http://127.0.0.1:{port}", None, 4)
    deadline = time.monotonic() + 180
    while not client.ready():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    yield model, f"http://127.0.0.1:{front}"
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


SLOW_UPDATE = """
import sys, time
from luffy import train
from luffy.cli import main
update = train.update
def slow(*given):
    time.sleep(4.5)  # idle, so that the server beside it has the processor
    return update(*given)
train.update = slow
sys.exit(main(sys.argv[1:]))
"""


def during(run, name: str) -> list[tuple[float, float]]:
    """When what is called so in a run's timeline began and ended."""
    text = (run / "timeline.json").read_text()
    events = [e for e in json.loads(text.rstrip().rstrip(",") + "]") if e["ph"] == "X" and e["name"].startswith(name)]
    return [(e["ts"], e["ts"] + e["dur"]) for e in events]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_with_answers_that_take_five_seconds_a_step_ahead_takes_six_tenths(tmp_path, delayed_server):
    """On whole runs whose updates take about as long; and the model of `bench.async_sim` predicts the second from the
    first."""
    model, url = delayed_server
    given = {"train__steps": 7, "train__updates_per_step": 1, "checkpoint__every": 0, "eval__every": 0}
    given |= {"eval__limit": 1, "rollout__engine": "server", "rollout__urls": json.dumps([url])}
    given |= {"correction__kind": "truncate", "rollout__max_sequences": 64}
    found = {}
    for ahead in (0, 1):
        run = tmp_path / f"ahead-{ahead}"
        command = [sys.executable, "-c", SLOW_UPDATE, *arguments(run, model, rollout__max_staleness=ahead, **given)]
        secret = {"LUFFY_API_KEY": "a key that nobody may find"}
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=240, env=os.environ | secret
        )
        assert done.returncode == 0, done.stderr[-3000:]
        kept = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
        assert not any(secret["LUFFY_API_KEY"].encode() in text for text in [*kept, done.stdout.encode()])
        found[ahead] = records(run)[2:]
        sampled, updates = (during(run, name) for name in ("ahead", "update"))
        assert any(a < d and c < b for a, b in sampled for c, d in updates) == bool(ahead)
    in_turn, ahead = (statistics.median(record["timing_s/step"] for record in found[n]) for n in (0, 1))
    print(f"in turn {in_turn:.2f} s a step, ahead {ahead:.2f}: {ahead / in_turn:.2f}")
    assert ahead <= 0.6 * in_turn
    for record in found[1]:  # the trainer waits for what is left of the 5 s alone, and sampling for nobody
        assert record["trainer/idle_s"] < 2.5
        assert record["rollout/idle_s"] < 1.0
    said, seen = async_sim.compare(tmp_path / "ahead-0", tmp_path / "ahead-1")["s/step"]
    print(f"predicted {said:.2f} s, seen {seen:.2f}")
    assert said == pytest.approx(seen, rel=0.2)
