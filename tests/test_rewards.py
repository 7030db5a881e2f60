"""Graders and the pool that can outlive them."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from jobs import running

from luffy.data import load_problems
from luffy.errors import UserError
from luffy.rewards import GRADERS, Verdict, VerifierPool, grade_answer, grade_boxed, grade_number, grade_train
from luffy.rewards.graders import shortcut, symbolic
from luffy.rewards.pool import Waiting

ROOT = Path(__file__).resolve().parents[1]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"

ODD_GRADERS = """
    import os, sys, time

    def odd(response, answer):
        print("noise on stdout", flush=True)
        if response == "hang":
            while True:
                pass
        if response == "hang in C":
            return float(len(str(9 ** 9 ** 9 ** 9)))
        if response == "die":
            os._exit(3)
        if response == "raise":
            raise OverflowError("too large")
        if response == "fill memory":
            return float(len(bytearray(6 << 30)))
        if response == "nan":
            return float("nan")
        if response.startswith("sleep"):
            time.sleep(float(response.split()[1]))
        if response == "modules":
            return float("torch" in sys.modules or "vllm" in sys.modules)
        if response == "parent path":
            return float(len(answer))
        return 1.0 if response.split()[-1] == answer else 0.0
"""


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """Import path of a grader that misbehaves on request."""
    (tmp_path / "odd_graders.py").write_text(textwrap.dedent(ODD_GRADERS))
    monkeypatch.syspath_prepend(tmp_path)
    return "odd_graders:odd"


def test_train_needs_the_think_end_and_no_box():
    assert grade_train("so x is 57.", "57") == 0.0
    assert grade_train("<think>\nhm</think>so x is 57.", "57") == 1.0
    assert grade_boxed("<think>\nhm</think>so x is 57.", "57") == 0.0
    assert grade_answer("so x is 57.", "57") == 1.0


def test_train_grades_between_the_first_and_a_second_think_end():
    assert grade_train("\\boxed{57}</think>so x is 3.", "57") == 0.0
    assert grade_train("a</think>so x is 57.</think>so x is 3.", "57") == 1.0
    assert grade_train("a</think>so x is 3.</think>so x is 57.", "57") == 0.0
    assert grade_train("a</think>", "57") == 0.0


def test_a_wrong_trace_gets_zero_from_every_grader():
    trace = "<think>\n4+8=13\n</think>\nThe answer is \\boxed{13}."
    graders = {name: grader for name, grader in GRADERS.items() if name != "gym"}  # whose answers are problems
    assert {name: grader(trace, "12") for name, grader in graders.items()} == dict.fromkeys(graders, 0) | {
        "deepscaler_v1": -0.5
    }


def test_equal_values_in_other_forms_count():
    assert grade_answer("thus $\\frac{1}{2}$", "0.5") == 1.0
    assert grade_answer("\\boxed{2}", ("3", "2")) == 1.0
    assert grade_boxed("first \\boxed{1}, no: \\boxed{\\frac{4}{2}}", "2") == 1.0
    assert grade_boxed("first \\boxed{2}, no: \\boxed{1}", "2") == 0.0
    assert grade_boxed("it never closes \\boxed{2", "2") == 0.0


def test_the_shortcut_agrees_with_math_verify():
    texts = [
        "{}",
        "so it is {}.",
        "4+8=12, 12+2=14. The answer is \\boxed{{{}}}.",
        "1) 4+8=12\n2) 12+2=14\nSo the answer is \\boxed{{{}}}.",
        "a -> \\boxed{{{}}}",
        "answer: 99 then \\boxed{{{}}} and 98 apples, 50%",
        "The Final Answer is 99. \\boxed{{{}}}",
        "The final answer is 99. I hope so. \\boxed{{{}}}",
        "The answer is $7$, no \\boxed{{{}}}",
        " [\\boxed{{{}}}] ",
        "\\boxed{{{}}}% of 3/4 = 8",
        "\\boxed{{{}}} and \\boxed{{8}}",
        "x=\\boxed{{{}}}, y=3 or 4, and 5",
        "\\boxed{{5,{}}}",
        "no numbers here, {}",
    ]
    values = ["0", "7", "-7", "12", "100", "1234567", "-0", "007", "1.0", "1,234", "10000000000000", "", "x", "seven"]
    taken = 0
    for text in texts:
        for value in values:
            response = text.format(value)
            for gold in ("0", "7", "-7", "12", "1234", "1234567", "99999", "x", "1/2"):
                short = shortcut(response, (gold,))
                if short is not None:
                    taken += 1
                    assert short == symbolic(response, (gold,)), (response, gold)
    assert taken > 300, "the shortcut must be worth having"
    assert shortcut("\\boxed{12}", ("7", "12")) is True
    assert shortcut("$\\boxed{12}$", ("12",)) is None


def test_verdicts_keep_their_order_and_are_cached(odd):
    pairs = [(f"sleep {0.05 if i % 3 == 0 else 0} is {i % 7}", str(i % 5)) for i in range(40)]
    with VerifierPool(odd, workers=2, timeout_s=5) as pool:
        first = pool.grade(pairs)
        assert [verdict.reward for verdict in first] == [float(i % 7 == i % 5) for i in range(40)]
        assert {verdict.status for verdict in first} == {"ok"}
        assert pool.grade(pairs) == first
        assert pool.grade([]) == []
        distinct = len(set(pairs))
        status = pool.status()
    assert (status["graded"], status["cached"]) == (distinct, 80 - distinct)


@pytest.mark.parametrize("way", ["hang", "hang in C"])
def test_a_hanging_answer_is_killed_and_the_others_are_graded(odd, way):
    with VerifierPool(odd, workers=2, timeout_s=2.0) as pool:
        pool.grade([("x 1", "1")])
        start = time.monotonic()
        verdicts = pool.grade([("a 1", "1"), (way, "1"), ("b 2", "2"), (f"{way}", "2"), ("c 3", "3")])
        assert time.monotonic() - start < 20
        ok, late = Verdict(1.0, "ok"), Verdict(0.0, "timeout")
        assert verdicts == [ok, late, ok, late, ok]
        assert pool.grade([("d 4", "4")]) == [ok]
        status = pool.status()
    assert (status["timeouts"], status["crashes"], status["respawns"]) == (2, 0, 2)


def test_a_dying_or_raising_grader_is_a_counted_crash(odd):
    with VerifierPool(odd, workers=1, timeout_s=5) as pool:
        verdicts = pool.grade([(way, "1") for way in ("die", "raise", "nan", "fill memory", "a 1")])
        status = pool.status()
    assert [verdict.status for verdict in verdicts] == ["crash"] * 4 + ["ok"]
    assert [verdict.reward for verdict in verdicts] == [0.0] * 4 + [1.0]
    assert (status["crashes"], status["timeouts"], status["respawns"]) == (4, 0, 1)


def test_a_worker_killed_while_idle_costs_no_answer(odd):
    with VerifierPool(odd, workers=1, timeout_s=5) as pool:
        pool.grade([("a 1", "1")])
        victim = pool._slots[0].process
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
        verdicts = pool.grade([("b 2", "2")])
        assert verdicts[0].reward in (0.0, 1.0)
        assert pool.grade([("c 3", "3")]) == [Verdict(1.0, "ok")]
    assert verdicts == [Verdict(1.0, "ok")]


def test_workers_import_neither_torch_nor_vllm(odd):
    with VerifierPool(odd, workers=1) as pool:
        assert pool.grade([("modules", "")]) == [Verdict(0.0, "ok")]


def test_any_text_can_be_graded(odd):
    with VerifierPool(odd, workers=1) as pool:
        texts = ["\udc80 broken surrogate 1", "nul \0 and\nnewlines 1", "long " * 50_000 + " 1", "\u2028 1"]
        assert [verdict.reward for verdict in pool.grade([(text, "1") for text in texts])] == [1.0] * 4
        assert pool.grade([("parent path", ("a", "b", "c"))]) == [Verdict(3.0, "ok")]


def test_no_worker_outlives_the_pool(odd):
    pool = VerifierPool(odd, workers=2, timeout_s=5)
    pool.grade([("a 1", "1")])
    pids = [slot.process.pid for slot in pool._slots]
    assert all(running(pid) for pid in pids)
    pool.close()
    pool.close()
    assert not any(running(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="closed pool"):
        pool.grade([("a 1", "1")])


def start_parent(odd, tmp_path, last_line, timeout_s=60):
    """A process that opens a pool, prints its workers' ids and then runs `last_line`."""
    script = f"""
        import sys, time
        sys.path.insert(0, {str(tmp_path)!r})
        from luffy.rewards import VerifierPool
        pool = VerifierPool({odd!r}, workers=2, timeout_s={timeout_s})
        pool.grade([("a 1", "1"), ("sleep 0.3 1", "1")])
        print(*[slot.process.pid for slot in pool._slots], flush=True)
        {last_line}
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells ignore it
    try:
        parent = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    return parent, pids


def wait_until_gone(pids, limit_s=20.0):
    start = time.monotonic()
    while any(running(pid) for pid in pids):
        assert time.monotonic() - start < limit_s, f"still there: {pids}"
        time.sleep(0.05)


def test_ctrl_c_leaves_no_worker_and_no_worker_traceback(odd, tmp_path):
    parent, pids = start_parent(odd, tmp_path, 'pool.grade([("hang", "1"), ("hang", "2")])')
    time.sleep(0.3)
    os.killpg(parent.pid, signal.SIGINT)  # what the terminal sends: to the parent's whole group
    _, errors = parent.communicate(timeout=20)
    assert errors.count("Traceback") == 1, errors
    assert "worker" not in errors
    wait_until_gone(pids)


def test_a_parent_that_just_ends_leaves_no_worker(odd, tmp_path):
    parent, pids = start_parent(odd, tmp_path, "pass")
    _, errors = parent.communicate(timeout=20)
    assert parent.returncode == 0
    assert "Traceback" not in errors
    wait_until_gone(pids)


@pytest.mark.parametrize("doing", ["time.sleep(60)", 'pool.grade([("hang in C", "1"), ("hang", "2")])'])
def test_workers_end_when_the_parent_is_killed(odd, tmp_path, doing):
    parent, pids = start_parent(odd, tmp_path, doing, timeout_s=2)
    time.sleep(0.3)
    parent.kill()
    parent.communicate(timeout=20)
    wait_until_gone(pids)


def test_an_interrupted_call_does_not_spoil_the_next(odd):
    def interrupt(signum, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with VerifierPool(odd, workers=1, timeout_s=20) as pool:
            pool.grade([("a 1", "1")])
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                pool.grade([("sleep 1.5 1", "1")])
            assert pool.grade([("b 2", "3")]) == [Verdict(0.0, "ok")]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_a_grader_that_does_not_load_is_an_error():
    with pytest.raises(ValueError, match="grader must be among train, answer, boxed"):
        VerifierPool("precise")
    with pytest.raises(ValueError, match="workers must be"):
        VerifierPool("train", workers=0)
    with pytest.raises(ValueError, match="timeout_s must be"):
        VerifierPool("train", timeout_s=0)
    with pytest.raises(ValueError, match="cannot be loaded: No module named 'no_such_module'"):
        VerifierPool("no_such_module:grade", workers=1)


def test_a_grader_that_loads_only_in_the_parent_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "shy.py").write_text(
        "import sys\nif 'luffy.rewards.worker' in sys.orig_argv:\n    raise ImportError('not in here')\n"
        "def grade(response, answer):\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with (
        VerifierPool("shy:grade", workers=1) as pool,
        pytest.raises(UserError, match="could not start: not in here"),
    ):
        pool.grade([("a", "b")])


def test_a_parent_with_an_importing_main_is_not_run_again(odd, tmp_path):
    script = tmp_path / "script.py"
    body = f"""
        import sys
        print("main ran", flush=True)
        from luffy.rewards import VerifierPool
        with VerifierPool({odd!r}, workers=2) as pool:
            print(pool.grade([("a 1", "1")])[0].status)
    """
    script.write_text(textwrap.dedent(body))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[:2] == ["main ran", "ok"], done.stderr


def test_gsm8k_traces_verify():
    if not GSM8K.exists():
        pytest.skip(f"{GSM8K} is not there")
    problems = load_problems(GSM8K)
    assert len(problems) == 7473
    sample = problems[::37][:200]
    assert len(sample) == 200
    with VerifierPool("answer", workers=2) as pool:
        verdicts = pool.grade([(problem.traces[0], problem.answer) for problem in sample])
        wrong = pool.grade([(problem.traces[0], f"{problem.answer}1") for problem in sample])
    assert [verdict.reward for verdict in verdicts] == [1.0] * 200
    assert [verdict.reward for verdict in wrong] == [0.0] * 200


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("6+0=6, 6+6=12, 12+7=19. The answer is \\boxed{19}.", "19", 1.0),
        ("so it is 19", "19", 1.0),
        ("The sum of the digits of 6067 is 6 + 0 + 6 + 7 =", "19", 0.0),
        ("\\boxed{6+0+6+7}", "19", 0.0),
        ("19 is wrong, it is \\boxed{18}", "19", 0.0),
        ("\\boxed{19} or 20", "19", 1.0),
        ("1,234 apples", "1234", 1.0),
        ("it is 19.0", "19", 1.0),
        ("-19", "19", 0.0),
        ("3-19", "19", 1.0),
        ("\\boxed{\\frac{38}{2}}", "2", 0.0),
        ("so \\boxed{19", "19", 0.0),
        ("it is $19$", "$19$", 1.0),
        ("0.5", ".5", 1.0),
        ("no number", "19", 0.0),
        ("x", "x", 0.0),
    ],
)
def test_the_number_grader_wants_the_number_itself(response, answer, reward):
    assert grade_number(response, answer) == reward


def test_math_verify_takes_an_unfinished_sum_for_its_value():
    # why `number` exists; should this ever fail, the quickstart can go back to `answer`
    assert grade_answer("The sum of the digits of 6067 is 6 + 0 + 6 + 7 = ", "19") == 1.0


def test_answers_with_one_gold_go_to_one_worker():
    """And long golds first."""
    jobs = [("a", "1"), ("b", "2"), ("c", "1"), ("d", ["3", "44"]), ("e", "2"), ("f", ("3", "44"))]
    waiting = Waiting(jobs)
    assert [waiting.take(None), waiting.take(None)] == [3, 0]
    assert waiting.take("1") == 2
    assert waiting.take(["3", "44"]) == 5
    assert waiting.take("1") == 1  # nobody has begun that gold
    waiting.put_back(1)
    assert waiting.take("2") == 1
    assert waiting.take("9") == 4  # what is left, whoever began it
    assert not waiting
