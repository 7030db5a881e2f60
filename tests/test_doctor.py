"""`luffy doctor` says what is there, and the docs list what was never run as it does."""

from pathlib import Path

from tiny import ROOT, luffy

from luffy import doctor
from luffy.doctor import UNVERIFIED, Finding, print_findings


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
    assert '"packages"' in done.stdout


def test_torch_that_vllm_is_not_built_for_is_said(monkeypatch):
    assert doctor.pinned("torch") == "2.13.0"
    monkeypatch.setattr(doctor, "installed", lambda *names: "2.12.1+cpu")
    assert "built for torch 2.13.0" in doctor._torch().lacks
    monkeypatch.setattr(doctor, "installed", lambda *names: "2.13.0+cpu")
    assert doctor._torch().lacks == ""


def test_what_is_missing_is_said_and_fails(capsys):
    assert print_findings([Finding("vLLM", "missing", "run scripts/setup.sh")]) == 1
    assert "! vLLM         missing" in capsys.readouterr().out


def test_docs_and_doctor_name_the_same_unverified_things():
    docs = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    for what, _ in UNVERIFIED:
        assert f"| {what} |" in docs, what
