"""Graders on answers as models write them, on the benchmarks' own golds, and on answers that are meant to do harm."""

import os
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bench.graders import PAGE, cases, cases_table
from luffy.rewards import GRADERS, VerifierPool, label
from luffy.rewards.arithmetic import read
from luffy.rewards.graders import echoes, symbolic
from luffy.rewards.latex import last_boxed, normal
from luffy.rewards.strict import plain, same, same_expression, same_text
from luffy.rewards.worker import MEMORY_LIMIT_BYTES

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"


def test_every_grader_says_what_the_table_says():
    other = [
        (case.response, case.gold, name)
        for case in cases()
        for name, mark in case.verdicts.items()
        if GRADERS[name](case.response, case.gold) != mark
    ]
    assert other == []


def test_the_table_is_about_what_benchmarks_ask_for():
    areas = Counter(case.area for case in cases())
    wanted = "fraction interval set tuple matrix unit percent thousands scientific boxes text degree inequality unicode"
    assert areas.keys() >= {*wanted.split(), "mixed number", "list", "letter", "choice", "money", "base", "think"}
    assert min(areas.values()) >= 5
    assert areas.total() >= 300
    assert PAGE.read_text().split("<!-- cases -->\n")[1].split("\n<!-- /cases -->")[0] == cases_table()


def test_what_is_wrong_is_never_right_for_the_strict_grader():
    """But for thoughts that never end, which an evaluation gives no grader."""
    accepted = [case for case in cases() if case.verdicts["boxed"] == 1 and not case.right]
    assert [case for case in accepted if case.area != "think"] == []
    turned_down = [case for case in cases() if case.right and case.verdicts["boxed"] == 0]
    assert len([case for case in turned_down if case.area not in ("choice", "boxes")]) <= 8  # of some 300


def golds(name: str) -> list[str]:
    if not DATA.is_dir():
        pytest.skip("needs ../shared/data")
    return [row["reward_model"]["ground_truth"] for row in pq.read_table(DATA / name).to_pylist()]


UNREADABLE = {"x_{0} \\cos (\\omega t)+$ $\\dot{x}_{0} \\sin (\\omega t) / \\omega"}
"""By math-verify alone: dollars in the middle of a formula."""


@pytest.mark.parametrize(("grader", "wrong"), [("boxed", set()), ("deepscaler", set()), ("train", UNREADABLE)])
def test_golds_are_right_and_quickly(grader, wrong):
    every = golds("luffy_valid.parquet")
    assert len(every) == 2019
    with VerifierPool(grader, workers=2) as pool:
        pool.grade([("\\boxed{1}", "1")])  # the workers have started
        began = time.monotonic()
        verdicts = pool.grade([(f"<think>\nhm\n</think>\nIt is \\boxed{{{gold}}}.", gold) for gold in every])
        seconds = time.monotonic() - began
    assert {gold for gold, verdict in zip(every, verdicts, strict=True) if verdict.reward < 1} == wrong
    assert {verdict.status for verdict in verdicts} == {"ok"}
    assert seconds <= 20  # 10 on an idle machine: bench.graders


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("grader", ["boxed", "train"])
def test_another_problems_gold_is_wrong(grader, step):
    every = list(dict.fromkeys(golds("luffy_valid.parquet")))
    pairs = [(f"<think></think> \\boxed{{{other}}}", gold) for gold, other in zip(every, every[1:], strict=False)]
    pairs = pairs[::step]
    with VerifierPool(grader, workers=2, timeout_s=1) as pool:  # two formulas of physics take it 5 s: not right
        verdicts = pool.grade(pairs)
    assert [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.reward] == []


@pytest.mark.parametrize(
    "form", ["\\boxed{{{}}}", "ANSWER: {}", "so it is ({}).", "The answer is **{}**", "\\boxed{{\\text{{{}}}}}"]
)
def test_letters_of_arc(form):
    every = golds("luffy_arc_c.parquet")
    assert len(every) == 1172
    others = {"A": "B", "B": "C", "C": "D", "D": "A", "1": "2", "2": "3", "3": "4", "4": "1"}
    assert {GRADERS["choice"](form.format(gold), gold) for gold in every} == {1.0}
    assert {GRADERS["choice"](form.format(others[gold]), gold) for gold in every} == {0.0}
    if "boxed" in form:
        assert {GRADERS["boxed"](form.format(gold), gold) for gold in every} == {1.0}
        assert {GRADERS["boxed"](form.format(others[gold]), gold) for gold in every} == {0.0}


def hostile(mark: Path) -> dict[str, str]:
    """Answers; whoever runs what they say leaves a file at `mark`."""
    shell = f"__import__('os').system('touch {mark}')"
    return {
        "tower": "9^{9^{9^{9^{9}}}}",
        "tower of stars": "9**9**9**9**9",
        "tower in brackets": "(((((9^99)^99)^99)^99)^99)",
        "powers of a sum": "(x+y+z+1)^{99}",
        "factorials": "100000000!",
        "factorials of factorials": "((((9!)!)!)!)!",
        "braces": "{" * 10_000 + "1" + "}" * 10_000,
        "braces that never close": "\\boxed{" * 10_000,
        "fractions in fractions": "\\frac{1}{" * 3000 + "2" + "}" * 3000,
        "roots in roots": "\\sqrt{" * 3000 + "2" + "}" * 3000,
        "brackets": "(" * 10_000 + "1" + ")" * 10_000,
        "five megabytes": "1 + " * 1_250_000 + "1",
        "five megabytes of digits": "7" * 5_000_000,
        "five megabytes of spaces": "1" + " " * 5_000_000 + "2",
        "five megabytes of backslashes": "\\" * 5_000_000,
        "null bytes": "4\x002\x00",
        "lone surrogate": "4\ud8002",
        "regular expressions": "(a+)+$" * 2000 + "!" * 2000,
        "units without end": "5 cm " * 5000 + "?",
        "commas without end": "1,000" * 5000,
        "an exponent": "1e999999999",
        "a small exponent": "1e-999999999",
        "an integral": "\\int_0^{\\infty} e^{-x^x^x} dx",
        "a sum": "\\sum_{n=1}^{10000000000} \\frac{1}{n^n}",
        "a large binomial": "\\binom{1000000000}{500000000}",
        "a matrix": "\\begin{pmatrix}" + "&".join(["9^{9^9}"] * 500) + "\\end{pmatrix}",
        "code": shell,
        "code in text": f"\\text{{{shell}}}",
        "code in a root": f"\\sqrt{{{shell}}}",
        "attributes": "().__class__.__base__.__subclasses__()",
    }


@pytest.mark.parametrize("grader", ["boxed", "train", "deepscaler", "choice", "number"])
@pytest.mark.parametrize("timeout_s", [0.5, pytest.param(4.5, marks=pytest.mark.slow)])
def test_hostile_answers(grader, timeout_s, tmp_path):
    """Each is settled within the clock and the next is graded right; memory stays below the limit; nothing is run.
    The clock of an answer is not that of a worker's start, which follows each that was killed."""
    mark = tmp_path / "mark"
    with VerifierPool(grader, workers=2, timeout_s=timeout_s) as pool:
        pool.grade([("\\boxed{1}", "1")] * 2)
        peaks, over = [0], threading.Event()

        def watch() -> None:
            while not over.wait(0.005):  # a worker that is killed takes its record with it
                peaks.append(max(rss(slot.process.pid) for slot in list(pool._slots)))

        watcher = threading.Thread(target=watch)
        watcher.start()
        for name, answer in hostile(mark).items():
            for gold in ("2", "\\frac{1}{7}"):
                start_workers(pool)
                began = time.monotonic()
                [verdict] = pool.grade([(f"<think></think> so \\boxed{{{answer}}}", gold)])
                assert time.monotonic() - began < timeout_s + 0.5, (name, gold)
                assert verdict.reward < 1, (name, gold)
            [right] = pool.grade([(f"<think>{name}</think> Answer: \\boxed{{3}}", "3")])
            assert right.reward == 1, name
        over.set()
        watcher.join()
        assert 0 < max(peaks) < MEMORY_LIMIT_BYTES
        assert pool.status()["graded"] >= 3 * len(hostile(mark))
    assert not mark.exists()


def start_workers(pool: VerifierPool) -> None:
    """Until all are there: what a pool hears of them, it hears while it grades."""
    while not all(slot.ready for slot in pool._slots):
        time.sleep(0.05)
        pool.grade([(f"<think>{time.monotonic()}</think> Answer: \\boxed{{3}}", "3")])


def rss(pid: int) -> int:
    """Most memory that a process has held, bytes; 0: it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def test_an_answer_that_is_as_hostile_as_its_gold():
    """Golds come from files, too."""
    answers = hostile(Path("/nonexistent"))
    with VerifierPool("boxed", workers=2, timeout_s=1) as pool:
        for name in (
            "tower",
            "factorials of factorials",
            "braces",
            "five megabytes",
            "an exponent",
            "a large binomial",
        ):
            start_workers(pool)
            began = time.monotonic()
            [verdict] = pool.grade([(f"\\boxed{{{answers[name]}+1}}", answers[name])])
            assert time.monotonic() - began < 1.5, name
            assert verdict.reward < 1, name
        assert pool.grade([("\\boxed{3}", "3")])[0].reward == 1


def test_expressions_are_read_and_never_run():
    import sympy

    x, y = sympy.symbols("x y")
    for text, value in {
        "2*x^2 + sqrt(3)/(1+pi)": 2 * x**2 + sympy.sqrt(3) / (1 + sympy.pi),
        "2x(y+1)": 2 * x * (y + 1),
        "-x^2": -(x**2),
        "2^-3": sympy.Rational(1, 8),
        "1/2/3": sympy.Rational(1, 6),
        "1.5x": sympy.Rational(3, 2) * x,
        "--3": 3,
        "3-+2": 1,
    }.items():
        assert sympy.simplify(read(text) - value) == 0, text
    for text in (
        "",
        "1+",
        "(1",
        "1)",
        "a.b",
        "__import__",
        "x[0]",
        "f'1'",
        "9^9^9",
        "9^100",
        "2^(x)!",
        "1/0",
        "0^-1",
        "1.2.3.4",
    ):
        assert read(text) is None, text
    assert read("1+" * 200 + "1") is None
    assert read("(" * 50 + "1" + ")" * 50) is None


def test_spellings_that_are_one():
    assert normal("\\dfrac12\\text{ cm}") == normal("x = 1/2") == "\\frac{1}{2}"
    assert plain("3\\sqrt2") == "3sqrt(2)"
    assert plain("2 million") == "2000000"
    assert same_text("5 m", "5") is False  # a letter is a variable
    assert same_expression("2/4", "1/2") is False
    assert same("2/4", "1/2")  # by math-verify
    assert same_expression("(1,2]", "(1,2)") is False
    assert same_expression("0.9999999", "1") is False
    assert last_boxed("\\boxed {a{b}c} d") == "a{b}c"


def test_a_grader_has_a_version():
    assert label("boxed") == "boxed-4"
    assert label("train") == "train-1"
    assert label("mine:grade") == "mine:grade"


def test_deepscaler_versions():
    right, wrong, no_box = "<think>a</think> \\boxed{2}", "<think>a</think> \\boxed{3}", "<think>a</think> 2"
    said = {
        name: [GRADERS[name](text, "2") for text in (right, wrong, no_box, "\\boxed{2}")]
        for name in ("deepscaler_v0", "deepscaler_v1", "deepscaler")
    }
    assert said == {"deepscaler_v0": [1, 0, 0, 0], "deepscaler_v1": [1, -0.5, -1, -1], "deepscaler": [1, 0, 0, 1]}
    assert GRADERS["deepscaler_v1"](right, "") == -1
    assert GRADERS["deepscaler"](right, ("3", "\\boxed{2}")) == 1


def test_graders_load_no_sympy_before_they_need_it():
    """A pool's parent need not pay for it."""
    code = "import sys, luffy.rewards; sys.exit('sympy' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([os.sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_an_echo_of_the_gold_is_what_math_verify_takes_for_right():
    taken = 0
    for gold in dict.fromkeys(golds("luffy_valid.parquet")[::3]):
        for text in (
            "We add 3 and 4. So \\boxed{{{}}}.",
            "\\boxed{{{}}}",
            "x = 5, so \\boxed{{{}}} or 4",
            "$5$ or \\boxed{{{}}}",
        ):
            if echoes(text.format(gold), (gold,)):
                taken += 1
                assert symbolic(text.format(gold), (gold,)), (text, gold)
    assert taken > 600
    assert not echoes("\\boxed{1} \\boxed{x}", ("x",))
    assert not echoes("The final answer is 3. \\boxed{x}", ("x",))
    assert not echoes("\\boxed{y}", ("x",))
