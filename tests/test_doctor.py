"""`luffy doctor` says what is there, and the docs list what was never run as it does."""

import json
import os
import platform
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tiny import ROOT, luffy

from luffy.diagnosis import hardware, software
from luffy.diagnosis.finding import Finding
from luffy.doctor import RELEVANT, UNVERIFIED, print_findings, without_paths


def test_it_says_what_this_machine_has(tmp_path):
    done = luffy("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in (
        "Python",
        "compiler",
        "memory",
        "model cache",
        "torch",
        "vLLM",
        "model.dtype auto is",
        "linear_policy_loss",
        "Never run by us",
    ):
        assert words in done.stdout
    assert not done.stderr


def test_a_report_has_no_secrets(tmp_path):
    done = luffy("doctor", "--report", cwd=tmp_path, HF_TOKEN="hf_secret", LUFFY_API_KEY="secret", NAME_OF_MINE="mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("```\n")
    assert "HF_TOKEN" in done.stdout
    assert "linear_policy_loss" in done.stdout
    for word in ("secret", "NAME_OF_MINE", str(Path.home()) + "/", str(tmp_path), str(ROOT)):
        assert word not in done.stdout
    assert platform.node() not in done.stdout
    assert '"packages"' in done.stdout


def test_json_says_the_same(tmp_path):
    done = luffy("doctor", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == int(not found["well"])
    assert {"torch", "triton", "driver", "shared mem", "luffy cache"} <= {one["name"] for one in found["findings"]}


def test_torch_that_vllm_is_not_built_for_is_said(monkeypatch):
    assert software.pinned("torch") == "2.13.0"
    monkeypatch.setattr(software, "installed", lambda *names: "2.12.1+cpu")
    assert "built for torch 2.13.0" in software.torch().lacks
    monkeypatch.setattr(software, "installed", lambda *names: "2.13.0+cpu")
    assert software.torch().lacks == ""


def test_every_pin_of_training_is_held_against_what_is_installed(monkeypatch):
    assert software.packages().lacks == ""
    asked = {one.name for one in software.needs("luffy-rl", "train")}
    assert {"transformers", "math-verify", "pydantic"} <= asked
    assert "peft" not in asked  # of another extra
    versions = {"transformers": "4.1.0", "math-verify": None}
    monkeypatch.setattr(software, "installed", lambda name: versions.get(name, "99"))
    found = software.packages()
    assert "transformers 4.1.0" in found.found
    assert "math-verify missing" in found.found
    assert "'math-verify==0.9.0'" in found.lacks


def test_triton_goes_with_torch(monkeypatch):
    monkeypatch.setattr(software, "wanted_by", lambda *names: Requirement("triton==3.6.0"))
    monkeypatch.setattr(software, "installed", lambda *names: "3.5.1")
    assert "torch was built with triton==3.6.0" in software.triton().lacks
    monkeypatch.setattr(software, "installed", lambda *names: "3.6.0")
    assert software.triton().lacks == ""


@pytest.mark.parametrize(
    ("driver", "lacks"),
    [
        ((None, None, None, False), ""),
        ((None, None, "12.9", False), "install NVIDIA's driver"),
        (("570.86", (12, 8), "12.9", True), ""),  # one of the same major version serves it
        (("535.10", (12, 2), "13.0", False), "too old for torch: install one for CUDA 13.0"),
        (("580.10", (13, 0), "12.9", False), "torch finds no GPU"),
        (("580.10", (13, 0), None, False), "built without CUDA"),
    ],
)
def test_a_driver_must_serve_the_cuda_of_torch(driver, lacks):
    found = hardware.driver_verdict(*driver)
    assert lacks in found.lacks
    assert bool(lacks) == bool(found.lacks)


def test_memory_and_folders(tmp_path):
    assert hardware.shared_memory(str(tmp_path / "none")).found == "none"
    assert hardware.cache("model cache", tmp_path / "not" / "yet", "HF_HOME").lacks == ""
    (tmp_path / "file").write_text("")
    assert "set HF_HOME" in hardware.cache("model cache", tmp_path / "file" / "below", "HF_HOME").lacks


@pytest.mark.parametrize(("free", "few"), [(9, True), (11, False)])
def test_memory_that_the_quickstart_has_no_room_in(monkeypatch, free, few):
    monkeypatch.setattr(hardware, "host_memory", lambda: (16 * hardware.GIB, free * hardware.GIB))
    found = hardware.memory()
    assert found.found == f"16 GiB, {free} available"
    assert ("quickstart takes some" in found.lacks) == few


def test_no_path_is_left_in_a_report():
    said = without_paths(
        f"2.8: /usr/lib/x.so: undefined symbol, in (/usr/lib/y.so.1) and {Path.home()}/z; see https://a/b/c"
    )
    assert said == "2.8: PATH: undefined symbol, in (PATH) and PATH; see https://a/b/c"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("(/dev/shm)", "(/dev/shm)"),
        ("12.9/13 and/or 3 GiB/s", "12.9/13 and/or 3 GiB/s"),
        ("`/tmp/w/my dir/sub/x.so` is", "PATH is"),
        ("'/a b' or \"/c d/e\"", "PATH or PATH"),
        ("/tmp/w/my dir/sub/x.so: cannot open shared object file", "PATH: cannot open shared object file"),
        ("/tmp/my\\ dir/x", "PATH"),
        ("at file:///home/bob/x", "at PATH"),
        ("in /secret now", "in PATH now"),
        ("a:/home/al/y:/z", "a:PATH:PATH"),
    ],
)
def test_paths_of_every_form_are_found(text, left):
    assert without_paths(text) == left


def test_a_report_names_the_variables_of_the_user_alone(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(RELEVANT)]:
        monkeypatch.delenv(name)
    done = luffy("doctor", "--report", cwd=tmp_path, TORCH_HOME="/x")
    assert "\nset: LUFFY_CACHE, TORCH_HOME\n" in done.stdout  # the first is of the call


@pytest.mark.parametrize("form", [(), ("--report",), ("--json",)])
@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_a_library_that_does_not_load_is_a_finding(tmp_path, name, form):
    """Python finds the broken one first, where an import of a broken binary fails."""
    broken = tmp_path / "broken" / name
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libxyz.so.3: undefined symbol: what')")
    done = luffy("doctor", *form, cwd=tmp_path, PYTHONPATH=f"{tmp_path / 'broken'}:{ROOT}")
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "ImportError: libxyz.so.3: undefined symbol: what" in done.stdout
    assert "scripts/setup.sh" in done.stdout
    if form == ("--json",):
        lacks = {one["name"] for one in json.loads(done.stdout)["findings"] if one["lacks"]}
        assert "imports" in lacks
        assert ("device" in lacks) == (name == "torch")


@pytest.mark.parametrize(("text", "why"), [("#!/bin/sh\nexec sleep 60\n", "timed out"), ("\0", "Exec format error")])
def test_a_compiler_that_does_not_answer_is_a_finding(tmp_path, monkeypatch, text, why):
    compiler = tmp_path / "c++"
    compiler.write_text(text)
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(software, "PATIENCE_S", 0.2)
    found = software.compiler()
    assert why in found.found
    assert str(compiler) in found.found
    assert found.lacks


def test_what_is_missing_is_said_and_fails(capsys):
    print_findings([Finding("vLLM", "missing", "run scripts/setup.sh")])
    assert "! vLLM         missing" in capsys.readouterr().out


def test_docs_and_doctor_name_the_same_unverified_things():
    docs = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    for what, _ in UNVERIFIED:
        assert f"| {what} |" in docs, what
