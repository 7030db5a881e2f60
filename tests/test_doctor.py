"""`luffy doctor` says what is there, and the docs list what was never run as it does."""

from tiny import ROOT, luffy

from luffy.doctor import UNVERIFIED, Finding, print_findings


def test_it_says_what_this_machine_has(tmp_path):
    done = luffy("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("Python", "torch", "vLLM", "model.dtype auto is", "linear_policy_loss", "Never run by us"):
        assert words in done.stdout
    assert not done.stderr


def test_what_is_missing_is_said_and_fails(capsys):
    assert print_findings([Finding("vLLM", "missing", "run scripts/setup.sh")]) == 1
    assert "! vLLM         missing" in capsys.readouterr().out


def test_docs_and_doctor_name_the_same_unverified_things():
    docs = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    for what, _ in UNVERIFIED:
        assert f"| {what} |" in docs, what
