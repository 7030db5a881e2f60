"""Ranks that look after each other: hangs are named, the dead are missed, a wish to stop travels."""

import doctest
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist
from jobs import ROOT, end, job, no_leftovers, orphans, pids, running, steps, wait_for  # noqa: F401

from luffy import hang
from luffy.errors import UserError
from luffy.failure import Failure, verdict
from luffy.hang import describe_hang
from luffy.interrupt import StopOnInterrupt, Stopped
from luffy.watchdog import Watchdog

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # Ranks._exit


def test_a_rank_that_hangs_is_named_and_shows_where_it_is(tmp_path):
    process = job(tmp_path, 3, 1000, "sleep:1:2", env={"HANG_S": "4"})
    err = end(process)
    assert process.returncode == 1
    last = err.splitlines()[-1]
    assert last.startswith("luffy: rank 1: step 2 hangs: rank 1 is in `rollout` for ")
    assert last.endswith(" s, ranks 0, 2 wait in `gather`")
    assert "luffy: rank 1 is here:" in err
    assert "in make_trouble" in err  # where rank 1 sleeps
    assert orphans(tmp_path) == []


def test_a_rank_that_is_frozen_is_missed(tmp_path):
    """As after the loss of a node: nobody is told, it just says nothing any more."""
    process = job(tmp_path, 2, 1000, env={"LOST_S": "2"})
    wait_for(lambda: steps(tmp_path))
    os.kill(pids(tmp_path)[1], signal.SIGSTOP)
    wait_for(lambda: process.poll() is not None or not running(pids(tmp_path)[0]), 20)
    os.kill(pids(tmp_path)[1], signal.SIGKILL)  # what a node without power does; the agent would wait 30 s for it
    err = end(process)
    assert process.returncode == 1
    assert "luffy: rank 1: has not been heard of for 2 s" in err
    assert "its node may be down" in err


def test_alone_a_hang_ends_the_process():
    code = """
import time
from luffy.interrupt import StopOnInterrupt
from luffy.watchdog import Watchdog
with Watchdog(None, 0, 1, StopOnInterrupt(), hang_s=0.3, poll_s=0.1) as watch:
    watch.phase("rollout", 7)
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "luffy: step 7 hangs: rank 0 is in `rollout` for 0 s"
    assert 'File "<string>", line 7' in done.stderr


class Ranks:
    """Watchdogs of several ranks in this process, with one store; what would end a rank ends its thread alone."""

    def __init__(self, size: int, monkeypatch, *, running: int | None = None, **times: float):
        self.store, self.ended = dist.HashStore(), {}
        monkeypatch.setattr("luffy.watchdog.os._exit", self._exit)
        monkeypatch.setattr("luffy.watchdog.FAREWELL_S", 0.1)
        self.stops = [StopOnInterrupt() for _ in range(size)]
        self.watches = [
            Watchdog(self.store, rank, size, self.stops[rank], poll_s=0.05, **times)
            for rank in range(size if running is None else running)
        ]
        self.threads = {watch._thread: rank for rank, watch in enumerate(self.watches)}
        for watch in self.watches:
            watch.start()

    def _exit(self, code: int):
        self.ended[self.threads.get(threading.current_thread(), "main")] = code
        raise SystemExit

    @property
    def failure(self) -> Failure:
        return Failure.parse(dist.PrefixStore("watchdog", self.store).get("failed"))

    def close(self):
        for watch in self.watches:
            watch.close()


@pytest.fixture
def ranks(monkeypatch):
    made = []

    def make(*args, **kwargs):
        made.append(Ranks(*args, monkeypatch=monkeypatch, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("preempted", [True, False])
def test_a_wish_to_stop_reaches_all(ranks, preempted):
    three = ranks(3)
    three.stops[1].ask(preempted)
    wait_for(lambda: all(stop.asked for stop in three.stops), 5)
    assert [stop.preempted for stop in three.stops] == [preempted] * 3
    assert three.ended == {}


def test_sigterm_that_all_have_heard_of_ends_nobody(ranks):
    two = ranks(2, quorum_s=0.3)
    for stop in two.stops:
        stop.sigterm_at = time.monotonic()
        stop.ask(preempted=True)
    time.sleep(0.8)
    assert two.ended == {}


def test_sigterm_that_somebody_cannot_hear_means_a_death(ranks):
    two = ranks(3, running=2, quorum_s=0.3)
    for stop in two.stops[:2]:
        stop.sigterm_at = time.monotonic()
        stop.ask(preempted=True)
    wait_for(lambda: len(two.ended) == 2, 5)
    assert two.ended == {0: 1, 1: 1}
    assert (two.failure.rank, two.failure.message, two.failure.secondary) == (2, "is gone", True)


def test_a_rank_that_never_speaks_is_missed(ranks):
    two = ranks(3, running=2, lost_s=0.4)
    wait_for(lambda: len(two.ended) == 2, 5)
    assert two.failure.rank == 2
    assert "has not been heard of" in two.failure.message


def test_a_rank_that_has_closed_is_not_missed(ranks):
    two = ranks(2, lost_s=0.3, quorum_s=0.3)
    two.watches[1].close()
    two.stops[0].sigterm_at = time.monotonic()
    two.stops[0].ask(preempted=True)
    time.sleep(0.8)
    assert two.ended == {}


def test_the_store_can_go_away(ranks, monkeypatch):
    two = ranks(2)

    def gone(*_):
        raise dist.DistNetworkError("connection reset\nand a long stack")

    two.watches[0]._store = type("Gone", (), {"set": gone})()
    wait_for(lambda: two.ended, 5)
    assert two.ended == {0: 1}


def test_a_failure_carries_its_exit_code_to_all(ranks, capfd, monkeypatch):
    monkeypatch.delenv("LUFFY_LAUNCHER", raising=False)
    three = ranks(3)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit), three.watches[2].together():
            raise UserError("model: no such folder")
    finally:
        signal.signal(signal.SIGTERM, before)
    wait_for(lambda: {0, 1, "main"} <= three.ended.keys(), 5)
    assert set(three.ended.values()) == {2}
    assert capfd.readouterr().err == "luffy: rank 2: model: no such folder\n"
    three.watches[2]._leaving.release()  # its thread waits for the end of the process


def test_together_lets_pass_what_all_have_agreed_on(ranks):
    two = ranks(2)
    with pytest.raises(Stopped) as stopped, two.watches[0].together():
        raise Stopped(preempted=True)
    assert stopped.value.exit_code == 0
    with pytest.raises(ZeroDivisionError), Watchdog(None, 0, 1, StopOnInterrupt()).together():
        raise ZeroDivisionError


def test_the_second_ctrl_c_is_an_ordinary_one():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells ignore it
    try:
        with StopOnInterrupt() as stop:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert (stop.asked, stop.preempted) == (True, True)
            signal.raise_signal(signal.SIGINT)
            assert stop.preempted
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_sentences():
    assert doctest.testmod(hang).failed == 0
    same = {"step": 4, "phase": "update", "order": 3, "since": 10.0}
    assert describe_hang({0: same, 1: same}, 40.0)[0] == "step 4 hangs: all 2 ranks are in `update` for 30 s"
    ahead = {"step": 5, "phase": "sync", "order": 0, "since": 30.0}
    said, culprits = describe_hang({0: ahead, 1: same, 2: same, 3: {}}, 640.0)
    assert said == "step 5 hangs: rank 3 is in `no phase`, ranks 1-2 wait in `update`, rank 0 waits in `sync`"
    assert culprits == [3]


class Ended:
    def __init__(self, exitcode: int, told: Failure | None = None):
        self.exitcode = exitcode
        self.error_file_data = {"message": "", **vars_of(told)} if told else {}


def vars_of(failure: Failure) -> dict:
    return {name: getattr(failure, name) for name in failure.__dataclass_fields__}


def test_whom_the_launcher_believes():
    lost = Failure.of(RuntimeError("closed by peer"), 0).as_secondary()
    bug = Failure.of(KeyError("x"), 5)
    assert verdict({0: Ended(1, lost), 1: Ended(-9), 2: Ended(-15)}, 3)[1] == 137
    assert verdict({0: Ended(1, lost), 1: Ended(1, bug)}, 8) == ("luffy: rank 5: KeyError: 'x'", 1)
    assert verdict({0: Ended(1, lost), 1: Ended(-15)}, 2)[0].startswith("luffy: rank 0: lost another rank")
    assert verdict({3: Ended(7), 4: Ended(-15)}, 8) == (
        "luffy: rank 3 ended with exit code 7; see its output above",
        7,
    )
    assert verdict({1: Ended(-15)}, 2) == ("luffy: rank 1 was ended by SIGTERM", 143)
