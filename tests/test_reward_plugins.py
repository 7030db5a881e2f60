"""Graders beyond mathematics: letters, texts, patterns, and programs that misbehave."""

import json
import os
import subprocess
import time

import pytest

from luffy.rewards import GRADERS, VerifierPool, grade_choice, grade_code, grade_exact, grade_regex
from luffy.rewards import code as code_module
from luffy.rewards.graders import find_grader
from luffy.rewards.texts import final_answer


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("so \\boxed{A} and then \\boxed{\\text{B}}", "B"),
        ("The answer is 12. No: the answer is 13", "13"),
        ("Answer: Paris\n", "Paris"),
        ("thinking\n\nLondon  \n\n", "London"),
        ("", ""),
    ],
)
def test_the_final_answer(response, said):
    assert final_answer(response) == said


@pytest.mark.parametrize(
    "response",
    ["\\boxed{B}", "\\boxed{\\text{B}}", "\\boxed{(B)}", "ANSWER: B", "the answer is (B).", "The answer is **B**",
     "Answer: B) because of that", "I think it is\nB", "\\boxed{b}", "Answer: option B", "I think it is B",
     "I choose (B).", "B, because A is wrong", "B. A is wrong"],
)  # fmt: skip
def test_a_letter_that_is_named(response):
    assert grade_choice(response, "B") == 1.0
    assert grade_choice(response, "C") == 0.0
    assert grade_choice(response, ("A", "(B)")) == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "",
        "B is wrong\nso is C",
        "answer: A or B",
        "Answer: Because",
        "\\boxed{}",
        "Answer: ABC",
        "I'd say so",
        "A. B. C.",
        "A, B",
        "(A) and (B)",
    ],
)
def test_a_letter_that_is_not(response):
    assert grade_choice(response, "B") == 0.0


def test_articles_and_pronouns_are_no_letters():
    assert grade_choice("A man walks into a bar, so none", "A") == 0.0
    assert grade_choice("I do not know", "I") == 0.0
    assert grade_choice("The answer is A", "A") == 1.0
    assert grade_choice("It is (A) man", "A") == 1.0


def test_digits_are_options_too():
    assert grade_choice("\\boxed{2}", "2") == 1.0
    assert grade_choice("\\boxed{2}", "1") == 0.0


def test_texts():
    assert grade_exact("The answer is  New   York.", "new york") == 1.0
    assert grade_exact("The answer is New York City", "new york") == 0.0
    assert grade_exact("Answer: b", ("a", "B")) == 1.0
    assert grade_regex("Answer: 2024-05-01", r"\d{4}-\d\d-\d\d") == 1.0
    assert grade_regex("Answer: on 2024-05-01", r"\d{4}-\d\d-\d\d") == 0.0


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nDone."


ADD = fenced("def add(a, b):\n    return a + b")
CASES = json.dumps({"cases": [{"input": "2 3\n", "output": "5"}, {"input": "1 1\n", "output": "2\n"}]})


def test_programs_that_are_right():
    assert grade_code(ADD, "assert add(2, 3) == 5\nassert add(-1, 1) == 0") == 1.0
    assert grade_code(fenced("a, b = map(int, input().split())\nprint(a + b)"), CASES) == 1.0
    assert grade_code("```\nx = 1\n```\nno, rather\n" + ADD, "assert add(1, 1) == 2") == 1.0  # the last block


@pytest.mark.parametrize(
    "program",
    [
        "def add(a, b):\n    return a - b",
        "def add(a, b",
        "import os\nos._exit(0)",
        "raise SystemExit(0)",
        "import sys\nsys.exit()",
    ],
)
def test_programs_that_are_wrong_or_leave_early(program):
    assert grade_code(fenced(program), "assert add(2, 3) == 5") == 0.0


def test_what_is_no_program():
    assert grade_code("def add(a, b): return a + b", "assert add(2, 3) == 5") == 0.0  # not fenced
    assert grade_code(fenced("print(4)"), CASES) == 0.0
    with pytest.raises(ValueError, match='needs "cases", at least one'):
        grade_code(ADD, '{"cases": []}')


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "x = bytearray(4 << 30)",
        "while True: print('x' * 10_000)",
        "open('big', 'wb').write(bytes(64 << 20))",
    ],
)
def test_programs_that_take_too_much(program, monkeypatch):
    monkeypatch.setattr(code_module, "SECONDS", 1)
    began = time.monotonic()
    assert grade_code(fenced(f"{program}\ndef add(a, b):\n    return a + b"), "assert add(2, 3) == 5") == 0.0
    assert time.monotonic() - began < 8


def test_a_program_leaves_nothing_behind(tmp_path, monkeypatch):
    """No processes; and it is given nothing of the environment."""
    monkeypatch.setattr(code_module, "SECONDS", 1)
    monkeypatch.setenv("LUFFY_API_KEY", "secret")
    marker = f"luffy-sandbox-{os.getpid()}"
    child = f"[sys.executable, '-c', 'import time; time.sleep(30)', '{marker}']"
    spawn = f"import os, subprocess, sys\ntry:\n    subprocess.Popen({child})\nexcept OSError:\n    pass\n"
    look = "assert 'LUFFY_API_KEY' not in os.environ\n"
    code_module.run(spawn + look)
    left = subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True).stdout
    assert marker not in left
    assert code_module.run(look.replace("os.environ", "__import__('os').environ")) == ""


def test_a_grader_that_is_killed_takes_its_program_along(tmp_path):
    marker = f"luffy-orphan-{os.getpid()}"
    with VerifierPool("code", workers=1, timeout_s=1.0) as pool:
        program = f"name = '{marker}'\nwhile True: pass"
        [verdict] = pool.grade([(fenced(program), "assert True")])
        assert verdict.status == "timeout"
        assert pool.grade([(ADD, "assert add(2, 3) == 5")])[0].reward == 1.0
    deadline = time.monotonic() + 5
    while "sandbox.py" in subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_graders_of_installed_packages(monkeypatch):
    class Entry:
        @staticmethod
        def load():
            return grade_exact

    monkeypatch.setattr("luffy.rewards.graders.entry_points", lambda group, name: [Entry] if name == "theirs" else [])
    assert find_grader("theirs") is grade_exact
    with pytest.raises(ValueError, match="grader must be among train, .*, gym or 'module:function', got 'nobodys'"):
        find_grader("nobodys")
    assert set(GRADERS) >= {"choice", "exact", "regex", "code"}
