"""Loggers against metrics.jsonl: what each has is read back by its own library, or in its own format."""

import contextlib
import json
import math
import os
import resource
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_train import arguments
from tiny import luffy, make_model

from luffy.config import Config, LogConfig
from luffy.config_file import load_config
from luffy.errors import UserError
from luffy.loggers.__main__ import follow
from luffy.loggers.follow import SINKS, Follower, Tail, numbers
from luffy.loggers.sink import without_secrets
from luffy.loggers.started import Loggers, check
from luffy.metrics import MetricsLog
from luffy.run_folder import RunFolder

EVERY = [
    pytest.param(
        name,
        marks=[
            pytest.mark.skipif(find_spec(name) is None, reason=f'needs the package: pip install "{name}"'),
            *([pytest.mark.slow] if name == "mlflow" else []),  # takes half a minute to import, each time
        ],
    )
    for name in SINKS
]
INSTALLED = [name for name in SINKS if find_spec(name)]
HAND_ON = [sys.executable, "-m", "luffy.loggers"]
Points = dict[tuple[str, int], list[float]]
"""(key, step) -> values, of which there should be one."""


def a_run(folder: Path) -> RunFolder:
    """That has its configuration, and nothing in its logs."""
    run = RunFolder(folder)
    run.open(Config())
    run.metrics.touch()
    run.evals.touch()
    return run


def train(folder: Path, to: list[str], first: int, last: int, scale: float = 1.0, die: bool = False) -> RunFolder:
    """What a training does to its logs: steps first..last, the earlier ones kept; every second one evaluates."""
    run, config = RunFolder(folder), Config()
    config.log.to = to
    config.rollout.engine = "server"
    config.rollout.urls = ["http://me:pass1234@10.0.0.7:8001"]
    run.open(config)
    log, evals = MetricsLog(run.metrics, first - 1), MetricsLog(run.evals, first - 1)
    loggers = Loggers(folder, config.log)
    loggers.start()
    if first == 1:
        evals.write(0, {"name": "heldout", "accuracy": 0.125, "interval": (0.0, 0.25), "by_source": {"a": 0.125}})
    for step in range(first, last + 1):
        record = {"critic/score/mean": scale * step / 7, "none": None, "nan": math.nan, "inf": -math.inf, "rows": step}
        log.write(step, record | {"traces/R1-x.y/count": 3, "perf/train_minutes": step / 10} | loggers.counts(step))
        for name in ("heldout", "ood") if step % 2 == 0 else ():
            evals.write(step, {"name": name, "accuracy": scale * step / 16, "val/test_score/AIME'24 (x)": 0.5})
        time.sleep(0.2)
    if die:
        time.sleep(3)  # so that some of it has arrived
        os.kill(os.getpid(), signal.SIGKILL)
    loggers.close()
    log.close()
    evals.close()
    return run


def in_a_process(folder: Path, to: list[str], *args, env: dict[str, str] | None = None) -> int:
    code = f"from test_loggers import *; train(Path({str(folder)!r}), {to!r}, *{args!r})"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)} | (env or {})
    return subprocess.run([sys.executable, "-c", code], env=environment, timeout=280).returncode


def started(run: Path, *to: str, **more) -> Loggers:
    loggers = Loggers(run, LogConfig(to=list(to), **more))
    loggers.start()
    return loggers


def note_of(run: Path, name: str = "tensorboard") -> dict:
    return json.loads((run / "loggers" / f"{name}.json").read_text())


def wait_until(condition, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def expected(run: Path) -> Points:
    found: Points = defaultdict(list)
    for file in ("metrics.jsonl", "evals.jsonl"):
        for record in map(json.loads, (run / file).read_text().splitlines()):
            for key, value in numbers(record, file == "evals.jsonl").items():
                found[key, record["step"]].append(value)
    return found


def of_tensorboard(run: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    found: Points = defaultdict(list)
    for key in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(key):
            found[key, event.step].append(event.value)
    return found


def of_wandb(run: Path) -> Points:
    """Of the file that `wandb sync` sends: a log in LevelDB's format of the library's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = (run / "wandb").glob("offline-run-*/*.wandb")
    data, at, messages, part = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into what is left of the block
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole of a message, or its last part
            messages.append(Record.FromString(part))
            part = b""
    found: Points = defaultdict(list)
    for message in messages:
        if message.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in message.history.item
            }
            for key in items.keys() - {"_step", "_runtime", "_timestamp"}:
                found[key, items["_step"]].append(items[key])
    return found


MLFLOW = """
from mlflow import MlflowClient
client = MlflowClient("sqlite:///mlflow/mlflow.db")
[run] = client.search_runs([client.get_experiment_by_name("luffy").experiment_id])
assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
assert run.data.params["objective.name"] == "luffy"
points = [point for key in run.data.metrics for point in client.get_metric_history(run.info.run_id, key)]
found = [(point.key, point.step, point.value) for point in points]
"""
TRACKIO = """
import os
os.environ["TRACKIO_DIR"] = os.path.abspath("trackio")
from trackio.sqlite_storage import SQLiteStorage
[run] = SQLiteStorage.get_runs("luffy")
assert SQLiteStorage.get_run_config("luffy", run)["objective"]["name"] == "luffy"
records = SQLiteStorage.get_logs("luffy", run)
found = [(key, r["step"], r[key]) for r in records for key in r.keys() - {"step", "timestamp"}]
"""


def read_by(code: str, run: Path) -> Points:
    """In a process of its own: these libraries keep a database open, and look for it once."""
    code += "\nimport json\nprint('\\n' + json.dumps(found))"
    env = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run([sys.executable, "-c", code], cwd=run, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: Points = defaultdict(list)
    for key, step, value in json.loads(done.stdout.splitlines()[-1]):
        found[key, step].append(value)
    return found


READERS = {
    "tensorboard": of_tensorboard,
    "wandb": of_wandb,
    "mlflow": partial(read_by, MLFLOW),
    "trackio": partial(read_by, TRACKIO),
}


def assert_has_everything(run: Path, name: str) -> None:
    got, want = READERS[name](run), expected(run)
    assert got.keys() == want.keys()
    for point, values in want.items():
        assert got[point] == pytest.approx(values), point


ALSO_SLOW = [
    pytest.param(*one.values, marks=[*one.marks, pytest.mark.slow]) if one.values != ("tensorboard",) else one
    for one in EVERY
]


@pytest.mark.parametrize("name", ALSO_SLOW)
def test_it_has_what_the_files_have_after_a_stop_and_a_kill(name, tmp_path):
    run = tmp_path / "run"
    train(run, [name], 1, 5)
    identity = (run / "loggers" / "id").read_text()
    assert_has_everything(run, name)
    want = expected(run)
    assert {key for key, _ in want} == {
        *("critic/score/mean", "rows", "traces/R1-x.y/count", "perf/train_minutes", "log/lost"),
        *("eval/heldout/accuracy", "eval/ood/accuracy"),
        *(f"eval/{which}/val/test_score/AIME_24 _x_" for which in ("heldout", "ood")),
    }
    files = [path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "config.toml"]
    assert not any(b"pass1234" in text for text in files)
    assert in_a_process(run, [name], 6, 9, 1.0, True) == -signal.SIGKILL  # goes on; its last steps were not saved
    train(run, [name], 8, 10, scale=2.0)
    assert_has_everything(run, name)
    assert expected(run)["critic/score/mean", 9] == [pytest.approx(18 / 7)]
    assert (run / "loggers" / "id").read_text() == identity


@contextlib.contextmanager
def proxy() -> Iterator[tuple[str, list[bytes]]]:
    """A proxy that connects nobody, and what it was asked for."""
    asked: list[bytes] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                asked.append(client.recv(200))
                client.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked


@pytest.mark.parametrize("name", EVERY)
def test_nothing_leaves_the_machine_whatever_the_environment_says(name, tmp_path):
    with proxy() as (address, asked):
        env = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), address)
        env |= {key.lower(): value for key, value in env.items()} | {"NO_PROXY": "", "no_proxy": ""}
        env |= {"WANDB_MODE": "online", "WANDB_API_KEY": "0123456789" * 4, "HF_TOKEN": "hf_0123456789"}
        env |= {"TRACKIO_SPACE_ID": "me/space", "MLFLOW_TRACKING_URI": "http://example.org", "HF_HUB_OFFLINE": "0"}
        assert in_a_process(tmp_path / "run", [name], 1, 2, env=env) == 0
    assert asked == []
    assert_has_everything(tmp_path / "run", name)
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"0123456789" not in written


def test_one_that_cannot_open_is_told_once_and_counted(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "tensorboard").write_text("in the way")
    train(run, ["tensorboard"], 1, 2)
    loggers = started(run, "tensorboard")
    loggers._loggers[0]._process.wait(60)
    assert [loggers.counts(step)["log/lost"] for step in (3, 4, 5)] == [1.0, 2.0, 3.0]
    loggers.close()
    said = capsys.readouterr().err
    assert said.count("warning: tensorboard d") == 2  # one a run
    assert "FileExistsError" in said or "NotADirectoryError" in said
    (run / "tensorboard").unlink()
    done = subprocess.run([*HAND_ON, str(run), "tensorboard"])
    assert done.returncode == 0
    assert_has_everything(run, "tensorboard")


@pytest.mark.skipif(find_spec("trackio") is None, reason="needs trackio")
def test_what_trackio_only_warns_of_is_a_failure(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "trackio").write_text("in the way")
    train(run, ["trackio"], 1, 2)
    assert "warning: trackio did not take all metrics (" in capsys.readouterr().err


def test_one_that_is_killed_is_counted_and_started_anew_by_the_next_run(tmp_path, capsys):
    run = tmp_path / "run"
    train(run, ["tensorboard"], 1, 2)
    loggers = started(run, "tensorboard")
    assert loggers.counts(2) == {"log/lost": 0.0}
    wait_until(lambda: note_of(run)["pid"] == loggers._loggers[0]._process.pid and note_of(run)["step"] == 2)
    loggers._loggers[0]._process.kill()
    loggers._loggers[0]._process.wait()
    assert loggers.counts(3) == {"log/lost": 1.0}
    loggers.close()
    assert capsys.readouterr().err.count("ended with code -9") == 1
    train(run, ["tensorboard"], 3, 4)
    assert_has_everything(run, "tensorboard")


def test_a_full_disk_is_counted(tmp_path, capsys):
    run = a_run(tmp_path / "run")
    log, evals = MetricsLog(run.metrics, 0), MetricsLog(run.evals, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # the logger inherits it
    try:
        loggers = started(run.path, "tensorboard")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for step in range(1, 9):
        log.write(step, {f"critic/{n}": 1.0 for n in range(50)})
    loggers.close()
    evals.close()
    log.close()
    assert "File too large" in capsys.readouterr().err
    note = note_of(run.path)
    assert note["lost"] >= 1
    assert note["read"] is None


def test_one_that_hangs_is_told_and_counted_until_it_goes_on(tmp_path, capsys, monkeypatch):
    run = a_run(tmp_path / "run")
    log = MetricsLog(run.metrics, 0)
    loggers = started(run.path, "tensorboard")
    process = loggers._loggers[0]._process
    log.write(1, loggers.counts(1))
    wait_until(lambda: (run.path / "loggers" / "tensorboard.json").exists() and note_of(run.path)["step"] == 1)
    process.send_signal(signal.SIGSTOP)
    log.write(2, loggers.counts(2))
    assert loggers.counts(3) == {"log/lost": 0.0}
    monkeypatch.setattr("luffy.loggers.started.BEHIND_S", 0.0)
    time.sleep(0.01)
    assert [loggers.counts(step)["log/lost"] for step in (4, 5)] == [2.0, 3.0]  # of 4: steps 2 and 3
    assert capsys.readouterr().err.count("warning: tensorboard does not take all metrics (it has not taken step 2") == 1
    for step in (3, 4, 5):
        log.write(step, {"rows": step})
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: note_of(run.path)["step"] == 5)
    assert loggers.counts(6) == {"log/lost": 0.0}
    loggers.close()
    log.close()
    assert_has_everything(run.path, "tensorboard")


def test_one_that_waits_for_another_that_hangs_gives_up_and_says_whose(tmp_path, monkeypatch):
    run = a_run(tmp_path / "run").path
    other = Follower(run, "tensorboard")
    other.open()
    monkeypatch.setattr("luffy.loggers.follow.LOCK_S", 0.5)
    assert follow(run, "tensorboard") == 1
    hands = f"loggers: another process ({os.getpid()}) hands {run} to tensorboard; wait until it ends, or end it"
    assert note_of(run)["why"] == hands
    other.close()
    assert note_of(run)["why"] == ""


def test_what_ends_it_is_told(tmp_path, capsys):
    """Whatever it was, and wherever."""
    run = a_run(tmp_path / "run")
    run.metrics.write_text("no record\n")
    loggers = started(run.path, "tensorboard")
    loggers._loggers[0]._process.wait(60)
    assert loggers.counts(1) == {"log/lost": 1.0}
    loggers.close()
    assert f"(loggers: line 1 of {run.metrics} is no record: " in capsys.readouterr().err


def test_a_run_that_failed_waits_little_and_says_so(tmp_path, capsys, monkeypatch):
    run = a_run(tmp_path / "run").path
    monkeypatch.setattr("luffy.loggers.started.SILENT_S", 0.1)
    monkeypatch.setattr("luffy.loggers.started.STOPPED_S", 1.0)
    loggers = started(run, "tensorboard")
    loggers._loggers[0]._process.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    with contextlib.suppress(RuntimeError), loggers:
        raise RuntimeError
    assert 0.9 < time.monotonic() - begin < 5
    assert loggers._loggers[0]._process.poll() == -signal.SIGKILL
    waiting, warning = capsys.readouterr().err.splitlines()
    assert waiting.startswith("waiting for tensorboard, at most 1 s;")
    assert warning.startswith(
        "warning: tensorboard did not take all metrics (it was not done 1 s after the last record)"
    )
    assert "training goes on" not in warning


def test_an_interrupted_wait_leaves_no_process(tmp_path):
    run = a_run(tmp_path / "run").path
    loggers = started(run, "tensorboard")
    process = loggers._loggers[0]._process
    process.send_signal(signal.SIGSTOP)
    interrupt = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
    interrupt.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            loggers.close()
        assert process.poll() == -signal.SIGKILL
    finally:
        interrupt.cancel()
        process.kill()


@pytest.mark.parametrize("online", [[], ["trackio"]])
def test_the_command_that_is_named_is_one_that_runs(tmp_path, capsys, online):
    """Of this Python, with the words of a path in quotes; it sends where the logger was to send."""
    run = a_run(tmp_path / "a run").path
    loggers = started(run, "trackio", online=online)
    loggers._loggers[0]._process.kill()
    loggers.close()
    command = shlex.split(capsys.readouterr().err.split("`")[1])
    assert command == [*HAND_ON, str(run), "trackio", *["--online"] * len(online)]
    help_text = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert help_text.returncode == 0, help_text.stderr


@pytest.mark.skipif(find_spec("trackio") is None, reason="needs trackio")
def test_trackio_gives_no_hint_that_looks_elsewhere(tmp_path):
    run = a_run(tmp_path / "run").path
    done = subprocess.run([*HAND_ON, str(run), "trackio"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trackio show" not in done.stdout


def test_a_missing_package_is_refused_before_anything_else(monkeypatch):
    config = Config()
    config.log.to = ["wandb"]
    monkeypatch.setitem(sys.modules, "wandb", None)  # as Python marks what cannot be imported
    with pytest.raises(UserError, match=r'wandb is not installed; pip install "luffy-rl\[wandb\]"'):
        check(config.log)


def test_one_that_is_to_send_needs_an_address(tmp_path):
    pytest.importorskip("trackio")
    options = ["--log.to=trackio", "--log.online=trackio", "--run-dir", str(tmp_path / "run")]
    done = luffy("train", "quickstart", *options, cwd=tmp_path, TRACKIO_SPACE_ID="", TRACKIO_SERVER_URL="")
    assert done.returncode == 2
    assert "log.online: trackio has no address; set TRACKIO_SPACE_ID or TRACKIO_SERVER_URL" in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()


def test_online_is_about_loggers_that_are_used(tmp_path):
    with pytest.raises(UserError, match=r"log.online must be among log.to, got wandb"):
        load_config("quickstart", ["--log.online=wandb"])
    assert load_config("quickstart", ["--log.to=wandb,mlflow", "--log.online=wandb"]).log.to == ["wandb", "mlflow"]


def test_other_loggers_are_no_other_run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.open(Config())
    file = run.path / "config.toml"
    begin = file.read_text().index("[log]")
    file.write_text(file.read_text()[:begin])  # as runs had it before there were loggers
    config = Config()
    config.log.to = ["wandb", "mlflow"]
    run.check(config, resume=True)


@pytest.mark.parametrize("name", ["MY_API_KEY", "PGPASS", "SENTRY_AUTH", "AUTHORIZATION", "AWS_CREDENTIALS"])
def test_secrets_of_the_environment_are_taken_out(monkeypatch, name):
    monkeypatch.setenv(name, "abcdefgh1234")
    value = {"n": 3, "why": "401 for abcdefgh1234", "of abcdefgh1234": None}
    assert without_secrets(value) == {"n": 3, "why": "401 for ***", "of ***": None}


@pytest.mark.parametrize("name", ["GIT_AUTHOR_NAME", "XAUTHORITY"])
def test_who_wrote_it_is_no_secret(monkeypatch, name):
    monkeypatch.setenv(name, "abcdefgh1234")
    assert without_secrets("abcdefgh1234") == "abcdefgh1234"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://me:pw@host:1/x", "http://***@host:1/x"),
        ("http://me:p/w@host", "http://***@host"),
        ("http://me:p@w@host", "http://***@host"),
        ("https://h/x?api_key=abc", "https://h/x?api_key=***"),
        ("https://h?a=1&token=a/b#part", "https://h?a=***&token=***#part"),
        ("what? a=1", "what? a=1"),
    ],
)
def test_secrets_of_urls_are_taken_out(url, shown):
    assert without_secrets({"urls": [url]}) == {"urls": [shown]}
    assert without_secrets({url: f"no answer of {url} so far"}) == {shown: f"no answer of {shown} so far"}


def test_lines_are_read_when_they_are_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    tail = Tail(path)
    assert tail.read() == [{"step": 1}]
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert tail.read() == [{"step": 2}]
    assert Tail(path).starts_with(tail.bytes, tail.crc)
    path.write_text('{"step": 1}\n{"step": 3}\n')
    assert not Tail(path).starts_with(tail.bytes, tail.crc)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("evals.jsonl", '{"step": 2, "name": "heldo'),
        ("evals.jsonl", '{"step": 2}'),
        ("metrics.jsonl", "[1]"),
        ("metrics.jsonl", "\udcff"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, file, line):
    run = a_run(tmp_path / "run")
    with run.metrics.open("a") as metrics, run.evals.open("a") as evals:
        metrics.write('{"step": 1}\n')
        evals.write('{"step": 1, "name": "heldout", "accuracy": 0.5}\n')
    with (run.path / file).open("a", encoding="utf-8", errors="surrogateescape") as broken:
        broken.write(line + "\n")
    before = (run.path / file).read_bytes()
    done = subprocess.run([*HAND_ON, str(run.path), "tensorboard"], capture_output=True, text=True)
    assert done.returncode == 2
    said = f"error: loggers: line 2 of {run.path / file} is no record: expected a JSON object with "
    assert done.stderr.startswith(said)
    assert done.stderr.endswith("; take the line out, then hand the run on again\n")
    assert (run.path / file).read_bytes() == before


def test_help_and_training_import_none_of_them():
    code = """
import sys
import luffy.train
from luffy.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
print([name for name in ("wandb", "mlflow", "trackio", "tensorboard") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_a_real_training_with_all_of_them(tmp_path):
    make_model(tmp_path / "model")
    for minutes, more, last in ((1e-6, [], 1), (1000, ["--resume"], 2)):  # as a run is stopped by its time
        options = {"log__to": ",".join(INSTALLED), "train__steps": 2, "train__max_minutes": minutes, "name": "run"}
        done = luffy(*arguments(tmp_path / "run", tmp_path / "model", *more, **options), cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "warning" not in done.stdout
        for name in INSTALLED:
            assert_has_everything(tmp_path / "run", name)
        assert expected(tmp_path / "run")["log/lost", last] == [0.0]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stopped_training_holds_nothing_while_it_waits_for_a_logger_and_leaves_none(tmp_path):
    make_model(tmp_path / "model")
    run = tmp_path / "run"
    command = [sys.executable, "-m", "luffy", *arguments(run, tmp_path / "model", train__steps=500, name="run")]
    environment = os.environ | {"LUFFY_CACHE": str(tmp_path / "cache")}
    with (tmp_path / "said").open("w") as said:
        training = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=said, stderr=said)
    try:
        wait_until(lambda: (run / "loggers" / "tensorboard.json").exists() and note_of(run)["step"] > 0, 120)
        logger = note_of(run)["pid"]
        assert children(training.pid) > {logger}  # the verifiers' too
        os.kill(logger, signal.SIGSTOP)
        training.send_signal(signal.SIGINT)
        wait_until(lambda: "waiting for tensorboard, at most 10 s" in (tmp_path / "said").read_text(), 120)
        assert children(training.pid) == {logger}
        training.send_signal(signal.SIGINT)
        assert training.wait(60) == 130
        assert not Path(f"/proc/{logger}").exists()
    finally:
        training.kill()


def children(pid: int) -> set[int]:
    return {int(one) for task in Path(f"/proc/{pid}/task").iterdir() for one in (task / "children").read_text().split()}


def test_a_logger_that_cannot_open_is_one_sentence(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    train(run, [], 1, 2)
    (run / "tensorboard").write_text("in the way")
    (run / "loggers").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "luffy.loggers", str(run), "tensorboard"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: loggers: tensorboard cannot be opened (FileExistsError")
    assert done.stderr.count("\n") == 1
