"""What commands print: results on stdout, the rest on stderr, JSON as one document, colours where they are wanted."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, luffy, make_model

from luffy.files import write_json

SUM = {"prompt": "What is 1+1?", "answer": "2"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    make_model(home / "model")
    (home / "sums.jsonl").write_text(json.dumps(SUM) + "\n")
    (home / "answers.jsonl").write_text(json.dumps({"response": "\\boxed{2}", "answer": "2"}) + "\n")
    # a complete run, whose result is printed again
    run = home / "run"
    (run / "checkpoints").mkdir(parents=True)
    shown = luffy("recipes", "show", "quickstart", cwd=home).stdout
    (run / "config.toml").write_text(shown)
    score = {"name": "heldout", "num_problems": 4, "accuracy": 0.5, "interval": [0.2, 0.8]}
    result = {"objective": "luffy", "steps": 44, "asked": {"steps": 44, "max_minutes": 11.5}, "train_minutes": 1.0}
    write_json(
        run / "result.json", result | {"before": [score], "after": [score], "checkpoint": "checkpoints/step-000044"}
    )
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "on_off_metrics/off_score": 0.0}) + "\n")
    (run / "evals.jsonl").write_text("")
    return home


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (("recipes", "--json"), None),
        (("recipes", "list", "--json"), None),
        (("recipes", "show", "quickstart", "--json"), "model"),
        (("recipes", "diff", "quickstart", "gsm8k-smoke", "--json"), None),
        (("plan", "quickstart", "--gpu", "cpu", "--json"), "configured"),
        (("grade", "answers.jsonl", "--grader", "boxed", "--compare", "train", "--json"), "together"),
        (("doctor", "--json"), "findings"),
        (("data", "check", "sums.jsonl", "--model", "model", "--json"), "wrong"),
        (
            ("data", "prepare", "sums.jsonl", "--traces=0", "--out=made", "--tokenizer=model", "--json"),
            "problems",
        ),
        (("train", "quickstart", "--run-dir", "run", "--resume", "--json"), "run_folder"),
        (("report", "run", "--json"), "findings"),
    ],
)
def test_json_is_one_document(home, command, key):
    done = luffy(*command, cwd=home)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found
    if command[0] == "report":
        assert found["findings"]["run"][0]["cause"] == "a verifier that turns down verified traces"
    if key:
        assert key in found
    else:
        assert isinstance(found, list)


@pytest.mark.slow
def test_json_of_models_that_are_asked(home):
    """Through vLLM, which says much itself."""
    sampling = ["--model", "model", "--max-tokens", "4", "--kv-cache-gib", "0.25", "--json"]
    done = luffy("eval", "--data", "sums.jsonl", *sampling, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(json.loads(done.stdout)["models"]) == {"model"}
    done = luffy("generate", "1+1?", "--n", "2", *sampling, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads(done.stdout)["answers"]) == 2


@pytest.mark.slow
def test_quiet_leaves_the_result(home):
    quiet = [
        "--data",
        "sums.jsonl",
        "--model",
        "model",
        "--max-tokens",
        "3",
        "--kv-cache-gib",
        "0.25",
        "--out",
        "quiet",
    ]
    loud = luffy("eval", *quiet, cwd=home)
    assert "sums: 1/1" in loud.stderr
    done = luffy("eval", *quiet, "--quiet", cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    assert done.stdout == loud.stdout
    wrong = luffy("eval", *quiet, "--quiet", "--pass-at", "9", cwd=home)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("luffy: eval: pass@9")


def test_a_port_that_no_machine_has(home):
    done = luffy("report", "run", "--watch", "--port", "99999", cwd=home)
    assert done.returncode == 2
    assert done.stderr.endswith("argument --port: must be a whole number from 1 to 65535, got '99999'\n")


# --- a stdout that is lost -----------------------------------------------------------------------------------------

DRY = ("train", "quickstart", "--model.name", "model", "--dry-run")


def into(home: Path, stdout: int, *command: str, unbuffered: str = "") -> tuple[int, str]:
    """(exit code, stderr) of a command whose stdout is this."""
    env = os.environ | {"LUFFY_CACHE": str(home / "cache"), "PYTHONUNBUFFERED": unbuffered}
    whole = [sys.executable, "-m", "luffy", *command]
    done = subprocess.run(whole, cwd=home, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("command", "unbuffered"), [(("recipes",), ""), (("recipes",), "1"), (("--help",), ""), (DRY, "")]
)
def test_a_reader_may_go_before_the_end(home, command, unbuffered):
    """As `| head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    assert into(home, writer, *command, unbuffered=unbuffered) == (141, "")
    os.close(writer)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_below_stdout_is_one_sentence(home, unbuffered):
    full = os.open("/dev/full", os.O_WRONLY)
    said = "luffy: stdout cannot be written (No space left on device); free some space, or write elsewhere\n"
    assert into(home, full, "recipes", unbuffered=unbuffered) == (2, said)
    os.close(full)


# --- colours -------------------------------------------------------------------------------------------------------

TABLE = """
from luffy.console import StepProgress
from luffy.summary import print_result
from luffy.run_folder import RunFolder
with StepProgress(2, 0) as progress:
    progress.step(1, {}, 0.5)
print_result(RunFolder("run"))
"""


def environment(given: dict[str, str]) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TERM", "COLORTERM")}
    return plain | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"} | given


def on_a_terminal(home: Path, **given: str) -> str:
    """Everything that comes to a terminal of its own."""
    master, slave = pty.openpty()
    command = [sys.executable, "-c", TABLE]
    process = subprocess.Popen(command, cwd=home, env=environment(given), stdout=slave, stderr=slave)
    os.close(slave)
    said = b""
    try:
        while block := os.read(master, 65536):
            said += block
    except OSError:  # the other end is closed
        pass
    os.close(master)
    assert process.wait() == 0, said
    return said.decode()


def test_a_terminal_has_styles_and_a_live_bar(home):
    said = on_a_terminal(home, TERM="xterm-256color")
    assert "\x1b[1m" in said or "\x1b[3m" in said  # heads of the table
    assert "\x1b[?25l" in said  # the cursor is hidden while the bar moves
    assert "\x1b[38;5" in said or "\x1b[3" in said


def test_no_color_is_heeded(home):
    said = on_a_terminal(home, TERM="xterm-256color", NO_COLOR="1")
    assert not any(f"\x1b[{code}" in said for code in ("38;", "31m", "32m", "33m", "34m", "35m", "36m", "91m", "92m"))


def test_a_dumb_terminal_gets_plain_lines(home):
    said = on_a_terminal(home, TERM="dumb")
    assert "\x1b" not in said
    assert "step 1/2" in said


@pytest.mark.parametrize(("given", "styled"), [({}, False), ({"FORCE_COLOR": "1"}, True)])
def test_a_file_has_styles_only_where_they_are_forced_and_never_a_bar(home, given, styled):
    command = [sys.executable, "-c", TABLE]
    env = environment({"TERM": "xterm-256color"} | given)
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("\x1b[" in done.stdout) == styled
    assert done.stderr.startswith("step 1/2")
    assert "\x1b" not in done.stderr
    assert "held-out problems" in done.stdout
