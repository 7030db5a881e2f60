"""`luffy train --dry-run`: the real data of a run, and nothing done."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import ROOT, luffy, make_model

from luffy import dry_run, rates, stages
from luffy.cli import main
from luffy.config_file import load_stages
from luffy.errors import UserError
from luffy.manifest import write_manifest
from luffy.run_folder import RunFolder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """With a model whose weights nobody can read."""
    home = tmp_path_factory.mktemp("home")
    make_model(home / "model")
    (home / "model" / "model.safetensors").write_bytes(b"no weights")
    return home


def dry(home: Path, *more: str, run: str = "run", **env: str):
    base = ["train", "quickstart", "--dry-run", "--run-dir", run, "--model.name", home / "model"]
    return luffy(*base, *more, cwd=home, **env)


@pytest.fixture(scope="module")
def said(home) -> dict:
    done = dry(home, "--json", "--optim.lr", "2e-5", "--train.steps=100")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_counts_are_of_the_real_data(said, home):
    [stage] = said["stages"]
    assert said["changed"][-1] == {"key": "train.steps", "recipe": 44, "given": 100}
    assert {"key": "optim.lr", "recipe": 8e-5, "given": 2e-5} in said["changed"]
    [train] = (home / "cache" / "problems").glob("*/train.parquet")
    import pyarrow.parquet as pq

    rows = pq.read_table(train).to_pylist()
    data = stage["data"]
    assert (data["read"], data["kept"], data["with_trace"]) == (len(rows), len(rows), len(rows))
    longest = max(len(row["target"][0]["content"].encode()) for row in rows) + 1  # every byte is a token, and the EOS
    assert data["trace_tokens"]["most"] == longest
    step = stage["step"]
    assert (step["groups"], step["rollouts"], step["traces"]) == (8, 24, 8)
    expected = 8 * (data["prompt_tokens"]["mean"] + data["trace_tokens"]["mean"] + 3 * 18)
    assert step["tokens"] == pytest.approx(expected, rel=0.01)
    assert stage["epochs"] == pytest.approx(100 * 8 / 2000)
    assert stage["evaluation"]["sets"] == {"heldout": 256, "ood": 128}
    assert stage["evaluation"]["answers"] == 2 * (256 + 128) + 9 * 64


def test_memory_and_time_are_those_of_the_plan(said):
    [stage] = said["stages"]
    memory, seconds = stage["memory"], stage["seconds"]
    assert memory["needed"] == pytest.approx(sum(memory["parts"].values()))
    low, high = seconds["step"]
    assert 0 < low <= high
    assert low == pytest.approx(sum(sides[0] for sides in seconds["phases"].values()))
    assert seconds["training_left"][1] <= 60 * 11.5
    few, many = seconds["steps_in_time"]
    assert 0 < few <= many <= seconds["steps_left"] == 100
    assert many == 100 or (many - 1) * low < 60 * 11.5 <= many * low  # the last of them begins in time
    assert seconds["left"][1] > seconds["training_left"][1]
    assert "measured just now" in stage["machine"]["rates"] or "data sheet" in stage["machine"]["rates"]


def test_nothing_is_trained_or_written(home, said):
    assert not (home / "run").exists()
    assert {path.name for path in home.iterdir()} == {"model", "cache"}
    before = sorted((path, path.stat().st_mtime_ns) for path in home.rglob("*"))
    done = dry(home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted((path, path.stat().st_mtime_ns) for path in home.rglob("*")) == before
    for words in (
        "new, training begins with step 1",
        "kept 2,000 of 2,000 problems",
        "8 groups, 32 rows",
    ):
        assert words in done.stdout
    assert done.stderr == ""


def test_no_engine_is_imported(home):
    code = "import sys; from luffy.cli import main; assert main(sys.argv[1:]) == 0; assert 'vllm' not in sys.modules"
    command = [sys.executable, "-c", code, "train", "quickstart", "--dry-run", "--model.name", str(home / "model")]
    done = subprocess.run(command, cwd=home, env={"LUFFY_CACHE": str(home / "cache"), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0


@pytest.mark.slow
def test_other_machines(home):
    done = dry(home, "--gpu", "h100", "--gpus", "8", "--json")
    found = json.loads(done.stdout)
    assert (found["ranks"], found["stages"][0]["machine"]["name"]) == (8, "h100")
    assert dry(home, "--nproc-per-node", "2", "--json").stdout.count('"ranks": 2') == 1
    refused = luffy("train", "quickstart", "--gpu", "h100", cwd=home)
    assert refused.returncode == 2
    assert "--dry-run" in refused.stderr


@pytest.fixture
def here(home, monkeypatch, capsys):
    """A command in this process, as starting ten takes long: (exit code, stdout, last line of stderr)."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("LUFFY_CACHE", str(home / "cache"))

    def run(*more: str, folder: str = "run") -> tuple[int, str, str]:
        code = main(["train", "quickstart", "--run-dir", folder, "--model.name", str(home / "model"), *more])
        said = capsys.readouterr()
        return code, said.out, (said.err.splitlines() or [""])[-1]

    return run


@pytest.mark.parametrize(
    "options",
    [
        ["--data.max_prompt_tokens", "5"],
        ["--optim.lrr", "1"],
        ["--data.problems.train", "3"],
        ["--reward.grader", "oracle"],
        ["--train.tokens_per_micro", "20"],
    ],
)
def test_what_training_would_refuse(here, options):
    """In the same words."""
    planned, trained = here(*options, "--dry-run"), here(*options)
    assert planned == trained
    assert planned[0] == 2
    assert planned[2].startswith("luffy: ")


def test_fewer_problems_than_a_step_takes(here):
    code, _, said = here("--data.problems.train", "3", "--dry-run")
    assert code == 2
    assert said == (
        "luffy: data: 3 problems, and a step takes 8 (train.prompts_per_step); lower it, or bring more problems"
    )


def test_no_secrets_are_printed(here):
    """Of what was given."""
    urls = "http://me:pass1234@10.0.0.7:8001/?key=word5678"
    for form in ([], ["--json"]):
        code, plan, _ = here("--dry-run", "--rollout.engine=server", f"--rollout.urls={urls}", *form)
        assert code == 0
        assert "http://***@10.0.0.7:8001/?key=***" in plan.replace("\n", "")
        assert not any(secret in plan for secret in ("pass1234", "word5678"))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--gpu", "h999"], "--gpu must be one of h100"),
        (["--gpu", ""], "--gpu must be one of h100"),
        (["--gpus", "0"], "--gpus: must be a whole number of at least 1, got '0'"),
        (["--gpus", "-1"], "--gpus: must be a whole number of at least 1, got '-1'"),
    ],
)
def test_machines_that_there_are_not(home, options, word):
    """Also where nothing is looked up, as no costs are known."""
    done = dry(home, *options)
    assert done.returncode == 2
    assert word in done.stderr
    without = luffy("train", "quickstart", *options, cwd=home)
    assert without.returncode == 2, "only --dry-run takes them"


def test_a_step_is_told_by_the_rates_of_the_machine(here, monkeypatch):
    """Those of the machine on which a step of a model as small as this took 0.08 s; what others measure is theirs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(rates, "cpu_rates", lambda dtype: (137e9, 23.4e9))
    code, said, wrong = here("--dry-run", "--json", "--optim.lr", "2e-5", "--train.steps=100")
    assert code == 0, wrong
    low, high = json.loads(said)["stages"][0]["seconds"]["step"]
    assert low < 0.08 < high


def make_checkpoint(folder: Path, seconds: float) -> None:
    (folder / "trainer").mkdir(parents=True)
    (folder / "trainer/loop.json").write_text(json.dumps({"train_seconds": seconds}))
    write_manifest(folder, {})


def test_the_state_of_the_run_folder(home, here):
    shown = luffy("recipes", "show", "quickstart", cwd=home).stdout
    run = home / "held"
    run.mkdir()
    (run / "config.toml").write_text(shown.replace("embedded:smollm2-135m-instruct", str(home / "model")))
    code, _, refused = here("--dry-run", folder="held")
    assert code == 2
    assert "already holds a run; pass --resume" in refused
    lines = [json.dumps({"step": n, "timing_s/step": s}) + "\n" for n, s in enumerate((90.0, 50.0, 8.0, 9.0, 10.0), 1)]
    (run / "metrics.jsonl").write_text("".join(lines))
    _, begun, _ = here("--dry-run", "--resume", folder="held")
    assert "holds a run without a checkpoint; --resume begins with step 1" in begun
    assert "a step took 9 s so far (measured, median of this run)" in begun
    make_checkpoint(run / "checkpoints" / "step-000005", seconds=60 * 11.5 - 89)
    _, begun, _ = here("--dry-run", "--resume", folder="held")
    assert "39 steps left 89 s (the limit ends the run after 10 of them)" in begun
    with RunFolder(run).lock():
        assert "another process is training" in here("--dry-run", "--resume", folder="held")[2]
    asked = {"steps": 44, "max_minutes": 11.5}
    (run / "result.json").write_text(json.dumps({"asked": asked}))
    stage = json.loads(here("--dry-run", "--resume", "--json", folder="held")[1])["stages"][0]
    assert stage["state"]["state"] == "complete"
    assert stage["seconds"]["steps_left"] == 0


@pytest.mark.parametrize("text", ['{"asked": {"ste', "\udcff", "[]", "{}"])
def test_a_damaged_result_is_named(home, here, text):
    """By a plan and by a run."""
    shown = luffy("recipes", "show", "quickstart", cwd=home).stdout
    run = home / "damaged"
    run.mkdir(exist_ok=True)
    (run / "config.toml").write_text(shown.replace("embedded:smollm2-135m-instruct", str(home / "model")))
    (run / "result.json").write_text(text, errors="surrogateescape")
    planned, trained = here("--resume", "--dry-run", folder="damaged"), here("--resume", folder="damaged")
    assert planned == trained
    assert planned[0] == 2
    assert planned[2].startswith("luffy: damaged/result.json ")
    assert planned[2].endswith("; remove it and resume the run, which writes it anew from the last checkpoint")


def test_a_run_folder_that_cannot_be_made(home, here):
    (home / "file").write_text("")
    for folder in ("/proc/run", "file/run"):
        planned, trained = here("--dry-run", folder=folder), here(folder=folder)
        assert planned == trained
        assert planned[0] == 2
        assert "cannot open the run folder" in planned[2]
    (home / "file").unlink()


def test_one_that_cannot_be_written(tmp_path, monkeypatch):
    """The superuser of a container may write everywhere, so the answer of the kernel is given."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="cannot open the run folder"):
        dry_run._refuse_unwritable(tmp_path)


TWO = ["--first.objective.name", "sft", "--first.train.steps", "5", "--first.train.max_minutes", "null"]


@pytest.mark.slow
def test_two_stages(home):
    done = dry(home, *TWO, run="two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "stage 1 of 2: sft" in done.stdout
    assert "stage 2 of 2: luffy" in done.stdout
    assert "two/first: new, training begins with step 1" in done.stdout
    assert "two: new, training begins with step 1" in done.stdout


def test_two_stages_half_and_all_done(home, here):
    whole, (first, last) = RunFolder("stages"), load_stages("quickstart", ["--model.name", str(home / "model"), *TWO])
    whole.first.open(first)
    shutil.copytree(home / "model", whole.first.checkpoints / "step-000005")
    make_checkpoint(whole.first.checkpoints / "step-000005", seconds=60.0)
    asked = {"steps": 5, "max_minutes": None}
    kept = {"asked": asked, "checkpoint": "checkpoints/step-000005"}
    whole.first.finish(kept | {"objective": "sft", "steps": 5, "train_minutes": 1.0, "response_tokens": 0})
    _, said, wrong = here("--dry-run", "--resume", *TWO, folder="stages")
    assert "stages/first: complete after 5 steps; --resume goes on with stage 2\n" in said, wrong
    assert "stages: new, training begins with step 1\n" in said
    _, last = stages.due(whole, [first, last], resume=True)
    whole.open(last)
    whole.finish({"asked": {"steps": 44, "max_minutes": 11.5}})
    _, said, wrong = here("--dry-run", "--resume", *TWO, folder="stages")
    assert "stages/first: complete after 5 steps\n" in said, wrong
    assert "; --resume prints its result again\n" in said
