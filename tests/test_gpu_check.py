"""The GPU check tried on CPU: the command, what its JSON says, and that nothing is left out without a word."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import contenders, gpu_check, roofline
from bench.peers import CE, ENTROPY, LOGP, MODES, POLICY

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
PEERS = ("liger_flce", "liger_grpo", "cce", "verl_triton", "quack", "trl_logp")
TINY = ["--tiny", "--shapes", "16x97", "--tokens", "8", "--modes"]


def run_script(tmp_path: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The script from a folder with a space; nothing of this process's Triton set-up reaches it."""
    here = tmp_path / "a folder"
    here.mkdir(exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    kept |= {"PYTHON": sys.executable, "LUFFY_RESULTS": str(here), "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.run(["bash", str(SCRIPT), *arguments], cwd=here, env=kept, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def no_peers(monkeypatch):
    """A machine without any peer, whatever this one has."""

    def import_module(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

    monkeypatch.setattr(contenders, "import_module", import_module)


@pytest.fixture
def quick(monkeypatch):
    """Three rounds, and nothing compiled."""
    monkeypatch.setattr(gpu_check, "ROUNDS", 3)
    monkeypatch.setitem(contenders.CONTENDERS, "naive_compiled", (tuple(MODES), contenders.naive))


def check(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    path = tmp_path / "out.json"
    code = gpu_check.main(["--out", str(path), *arguments])
    return code, json.loads(path.read_text())


def why(report: dict) -> dict[str, str]:
    return {record["impl"]: record["why"] for record in report["skipped"]}


@pytest.mark.slow
def test_the_command_on_cpu(tmp_path):
    """The whole of it, but only one of the correctness tests."""
    done = run_script(tmp_path, *TINY, LOGP, PYTEST_ADDOPTS="-k test_auto_is_the_fused_backend_here")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "a folder" / "gpu_check-cpu.json").read_text())
    assert report["tests"] == {"ran": 1, "failed": [], "skipped": []}
    assert (report["device"], report["complete"]) == ("cpu", True)
    assert report["environment"]["torch"] == torch.__version__
    measured = {record["impl"] for record in report["results"] + report["unmodelled"]}
    assert {"ours", "naive", "gemm_x1"} <= measured
    assert measured | why(report).keys() == set(contenders.names(LOGP))
    assert "1 passed" in done.stdout
    assert "no comparison with the roofline" in done.stdout
    assert "16x97 (H 16, V 97), N 8, log-probs" in done.stdout
    assert sorted(p.name for p in (tmp_path / "a folder").iterdir()) == ["gpu_check-cpu.json"]


BROKEN = """
import luffy_kernels.testing
def assert_as_good_as(*args, **kwargs):
    raise AssertionError("injected")
luffy_kernels.testing.assert_as_good_as = assert_as_good_as
"""


@pytest.mark.slow
def test_failed_correctness_is_the_exit_code_and_the_table_still_comes(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    chosen = "-p broken -k 'test_logprobs and bfloat16-torch-small or test_auto'"
    done = run_script(tmp_path, *TINY, CE, PYTEST_ADDOPTS=chosen, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((tmp_path / "a folder" / "gpu_check-cpu.json").read_text())
    assert report["tests"]["ran"] == 2
    assert report["tests"]["failed"] == ["test_logprobs[torch.bfloat16-torch-small]"]
    assert "ours" in {record["impl"] for record in report["results"]}
    assert "CORRECTNESS FAILED:\n  test_logprobs[torch.bfloat16-torch-small]" in done.stdout


def test_help_needs_nothing(tmp_path):
    done = run_script(tmp_path, "--help", PYTHON="/nowhere/python", PATH="/usr/bin:/bin")
    assert done.returncode == 0
    for word in ("--tiny", "--out", "PYTHON", "LUFFY_RESULTS", "10 minutes", "torch 2.11", "exit code"):
        assert word in done.stdout


def stub(tmp_path: Path, text: str) -> str:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_what_is_missing_is_named(tmp_path):
    bare = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    done = run_script(tmp_path, PYTHON=str(bare / "bin" / "python"))
    assert done.returncode == 2
    assert "lacks:\ntorch 2.11 or newer\ntriton 3.6 or newer\npytest 7.0 or newer\n" in done.stderr
    assert "-m pip install 'torch>=2.11'" in done.stderr
    assert "not found" in run_script(tmp_path, PYTHON="/nowhere/python").stderr


def test_without_a_gpu_it_says_so_at_once(tmp_path):
    done = run_script(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no GPU here" in done.stderr


def test_a_signal_that_only_what_runs_heard_stops_it_too(tmp_path):
    python = stub(tmp_path, 'case "$*" in *"-m pytest"*) exit 130 ;; *gpu_check*) echo measured ;; esac')
    env = os.environ | {"PYTHON": python, "LUFFY_RESULTS": str(tmp_path)}
    done = subprocess.run(["bash", str(SCRIPT), "--tiny"], env=env, capture_output=True, text=True)
    assert done.returncode == 130
    assert "stopped; run the same command again" in done.stderr
    assert "measured" not in done.stdout


def test_interrupted_it_stops_at_once(tmp_path):
    """Control-C reaches the script and what it runs alike; a stand-in for Python sends it while it plays pytest."""
    python = stub(tmp_path, 'case "$*" in *pytest*) kill -INT 0 ;; *gpu_check*) echo measured ;; esac')
    env = os.environ | {"PYTHON": python, "LUFFY_RESULTS": str(tmp_path)}
    command = [shutil.which("bash") or "bash", str(SCRIPT), "--tiny"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, start_new_session=True)
    assert done.returncode in (130, -signal.SIGINT)
    assert "stopped; run the same command again" in done.stderr
    assert "measured" not in done.stdout


def test_every_mode_and_a_missing_peer(tmp_path, no_peers, quick, capsys):
    code, report = check(tmp_path, *TINY, *MODES)
    assert code == 0
    for mode in MODES:
        found = [r for key in ("results", "unmodelled", "skipped") for r in report[key] if r["mode"] == mode]
        assert sorted(r["impl"] for r in found) == sorted(contenders.names(mode))
        (mine,) = (r for r in found if r["impl"] == "ours")
        assert mine.get("logp_error", mine.get("loss_error")) < 1e-5
        assert mine["p20_ms"] <= mine["ms"] <= mine["p80_ms"]
        assert mine["rounds"] == 3
    assert why(report) == dict.fromkeys(PEERS, "not installed")
    printed = capsys.readouterr().out
    assert all(f"{peer:16s} not installed" in printed for peer in PEERS)


def test_all_contenders_compute_the_same():
    p = contenders.make_problem(16, 97, 12, "cpu", sequence=4)
    assert p.per_token.shape == p.targets.shape
    for mode in (CE, POLICY):
        found = {impl: contenders.load(impl, mode)(p) for impl in ("ours", "naive", "torch_lce")}
        for loss in found.values():
            assert float(loss.detach()) == pytest.approx(contenders.exact_loss(p, mode), abs=0.02)
    mine, plain = (contenders.load(impl, ENTROPY)(p) for impl in ("ours", "naive"))
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.03)


def test_a_contender_that_fails_is_a_line_and_the_others_go_on(tmp_path, no_peers, quick, monkeypatch):
    calls = iter(range(100))

    def later(mode):
        def call(p):
            if next(calls) == gpu_check.WARMUPS + 1:
                raise RuntimeError("broke\nin a round")
            return contenders.naive(mode)(p)

        return call

    def at_once(mode):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    monkeypatch.setitem(contenders.CONTENDERS, "quack", ((CE,), later))
    monkeypatch.setitem(contenders.CONTENDERS, "cce", ((CE,), at_once))
    code, report = check(tmp_path, *TINY, CE)
    assert code == 0
    assert why(report)["cce"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"
    assert why(report)["quack"] == "after 1 rounds: RuntimeError: broke"
    assert {"ours", "naive", "torch_lce"} == {r["impl"] for r in report["results"]}


class Ticks:
    """A clock by which every look takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_the_budget_starts_nothing_that_would_exceed_it(no_peers, quick, monkeypatch):
    budget = gpu_check.Budget(10, Ticks())
    assert budget.allows(8)
    assert not budget.allows(8)
    p = contenders.make_problem(16, 97, 8, "cpu")
    slow = gpu_check.warm_up
    monkeypatch.setattr(gpu_check, "warm_up", lambda *a: slow(*a) | {"ms": 10_000.0})  # three rounds: 30 seconds
    # 1: ours begins; 2: its 30 s fit; 3: gemm_x1 begins; 4: its 30 s do not fit in what ours left; and so on
    records = list(gpu_check.measure_group(p, LOGP, gpu_check.Budget(50, Ticks())))
    assert [r["impl"] for r in records if "ms" in r] == ["ours"]
    assert {"no time left for 3 rounds of 10000 ms", "not installed"} == {r["why"] for r in records if "why" in r}
    assert {r["why"] for r in gpu_check.measure_group(p, LOGP, gpu_check.Budget(0))} == {"no time left"}


def test_no_time_at_all_is_said_for_every_group(tmp_path):
    _, report = check(tmp_path, *TINY, LOGP, CE, "--minutes", "0")
    assert [(r["mode"], r["impl"], r["why"]) for r in report["skipped"]] == [
        (LOGP, "all", "no time left"),
        (CE, "all", "no time left"),
    ]


def test_what_a_gpu_would_write_is_what_the_roofline_reads(tmp_path, no_peers, quick, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "device_name", lambda where: "NVIDIA H100 80GB HBM3")
    monkeypatch.setitem(contenders.CONTENDERS, "quack", ((CE,), contenders.naive))
    _, report = check(tmp_path, *TINY, *MODES)
    assert "computed  for H100, beside what was measured on NVIDIA H100 80GB HBM3" in capsys.readouterr().out
    roofline.main(["--measured", str(tmp_path / "out.json")])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.split()[1] in ("ours", "naive", "quack", "torch_lce") for line in lines) == len(report["results"])
    assert {r["impl"] for r in report["unmodelled"]} == {
        "gemm_x1",
        "gemm_x3",
        "gemm_x4",
        "naive_bf16",
        "naive_wide",
        "naive_compiled",
    }


def test_a_contender_that_the_model_does_not_have_on_a_gpu_is_kept_apart():
    assert gpu_check.modelled("quack", CE, "NVIDIA H100 80GB HBM3")
    assert not gpu_check.modelled("quack", CE, "AMD Instinct MI300X")
    assert not gpu_check.modelled("quack", LOGP, "NVIDIA H100 80GB HBM3")
    assert gpu_check.modelled("quack", CE, "NVIDIA GeForce RTX 4090")


def test_an_interrupted_check_keeps_what_it_measured(tmp_path, no_peers, quick, monkeypatch):
    groups = gpu_check.measure_group

    def measure(p, mode, budget):
        if mode == CE:
            raise KeyboardInterrupt
        return groups(p, mode, budget)

    monkeypatch.setattr(gpu_check, "measure_group", measure)
    code, report = check(tmp_path, *TINY, LOGP, CE)
    assert (code, report["complete"]) == (130, False)
    assert {r["mode"] for r in report["results"]} == {LOGP}


@pytest.mark.parametrize("content", [None, "", "<testsuites><testsuite/></testsuites>"])
def test_tests_without_results_count_as_failed(tmp_path, content, quick, no_peers):
    path = tmp_path / "tests.xml"
    if content is not None:
        path.write_text(content)
    code, report = check(tmp_path, *TINY, LOGP, "--junit", str(path))
    assert code == 1
    assert report["tests"]["failed"][0].startswith("no results: ")
