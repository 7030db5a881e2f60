"""Bad input of training, on one rank and on many, for test_bad_input_walk.py."""

import json
import os
import shutil
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from bad_inputs import (
    STEPS,
    Bad,
    Home,
    Says,
    all_ranks,
    largest_file,
    make_narrow_model,
    small_disk,
    trace_row,
)

from luffy.checkpoint import saving
from luffy.run_folder import RunFolder

# --- training ---------------------------------------------------------------------------------------------------------


def without_column(home: Home):
    row = trace_row("What is 1+1?")
    del row["reward_model"]
    return home.train(data__path=home.parquet("missing.parquet", [row]))


def renamed_column(home: Home):
    row = trace_row("What is 1+1?")
    return home.train(data__path=home.parquet("renamed.parquet", [row | {"prompts": row.pop("prompt")}]))


def renamed_optional_column(home: Home):
    row = trace_row("What is 1+1?")
    return home.train(data__path=home.parquet("targets.parquet", [row | {"targets": row.pop("target")}]))


def cut_parquet(home: Home):
    file = home.parquet("cut.parquet", [trace_row("What is 1+1?")] * 50)
    file.write_bytes(file.read_bytes()[:-50])
    return home.train(data__path=file)


def damaged_parquet(home: Home):
    rows = [trace_row(f"What is {n}+1?") for n in range(3000)]
    file = home.parquet("damaged.parquet", rows, row_group_size=1000, compression="none")
    content = bytearray(file.read_bytes())
    at = content.find(b"What is 2500+1?")
    content[at - 4 : at] = b"\xff" * 4  # its length
    file.write_bytes(content)
    return home.train(data__path=file)


def cut_jsonl(home: Home):
    file = home.jsonl("cut.jsonl", [trace_row("What is 1+1?")] * 2)
    file.write_text(file.read_text()[:-40])
    return home.train(data__path=file)


def unreadable_jsonl(home: Home):
    """The third line is not text."""
    file = home.jsonl("torn.jsonl", [trace_row("What is 1+1?")] * 4)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:20] + b"\xff" + lines[2][21:]
    file.write_bytes(b"".join(lines))
    return home.train(data__path=file)


def no_tokenizer(home: Home):
    folder = make_narrow_model(home.path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    return home.train(model__name=folder)


def without_template(home: Home, name: str) -> Path:
    folder = make_narrow_model(home.path / name)
    (folder / "chat_template.jinja").unlink()
    return folder


def no_chat_template(home: Home):
    recipe = home.path / "plain.toml"  # the quickstart recipe brings a template of its own
    recipe.write_text(f'[model]\nname = "{without_template(home, "templateless")}"\n[data]\npath = "{home.data}"\n')
    return home.cli("train", recipe, "--run-dir", home.path / "runs" / "new")


class WithoutVllm(PathFinder):
    """Python's own finder of packages on a machine that lacks vLLM."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        return None if fullname == "vllm" else super().find_spec(fullname, path, target)


def no_vllm(home: Home):
    start = home.train()

    def act() -> int:
        with pytest.MonkeyPatch.context() as patched:
            kept = [finder for finder in sys.meta_path if finder is not PathFinder]
            patched.setattr(sys, "meta_path", [*kept, WithoutVllm])
            patched.delitem(sys.modules, "vllm", raising=False)
            return start()

    return act


def no_weights_for_vllm(home: Home):
    folder = shutil.copytree(home.model, home.path / "torn")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return home.process(*home.arguments(model__name=folder))


def blown_up(run: str, **options: Any):
    return lambda home: home.again(run=run, optim__lr=1e30, **options)


def skipped_steps(home: Home) -> None:
    run = home.path / "runs" / "skipped"
    bad = [json.loads(line)["actor/bad_updates"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (bad[0], bad[-2:]) == (0, [1, 1])
    weights = [run / "checkpoints" / f"step-{step:06d}" / "model.safetensors" for step in (STEPS - 1, STEPS)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def dumped_rows(home: Home) -> None:
    [dump] = (home.path / "runs" / "wild").glob("dump-step-*.json")
    assert {"prompt_ids", "token_ids", "reward", "advantage"} <= json.loads(dump.read_text())[0].keys()


def three_checkpoints(run: str):
    """No more than those that were there, and nothing half-written."""

    def check(home: Home) -> None:
        found = {path.name for path in (home.path / "runs" / run / "checkpoints").iterdir()}
        assert found == {f"step-{step:06d}" for step in (1, 2, 3)}

    return check


def full_disk(home: Home):
    copy = home.copy_of_run("full", last=3)
    size = (copy / "checkpoints" / "step-000003" / "model.safetensors").stat().st_size
    again = home.again("--resume", run="full")

    def act() -> int:
        with largest_file(size // 2):
            return again()

    return act


def what_a_run_says(home: Home):
    return lambda: CompletedProcess((), 0, (home.path / "whole.out").read_text(), "")


TRAINING = [
    Bad(
        error="missing dataset column",
        provoke=without_column,
        says=Says(
            "missing.parquet: column 'reward_model'",
            "expected prompt and reward_model",
            "is missing, the columns present are 'data_source', 'prompt'",
            "docs/data.md",
        ),
    ),
    Bad(
        error="renamed dataset column",
        provoke=renamed_column,
        says=Says(
            "renamed.parquet: column 'prompt'",
            "expected prompt and reward_model",
            "the nearest column present is 'prompts'",
            "docs/data.md",
        ),
    ),
    Bad(
        error="renamed dataset column, an optional one",
        provoke=renamed_optional_column,
        says=Says(
            "targets.parquet", "is it 'target'?", "column 'targets' is unknown", "expected prompt and reward_model"
        ),
    ),
    Bad(
        error="truncated parquet",
        provoke=cut_parquet,
        says=Says("cut.parquet: ", "Parquet magic bytes", "truncated parquet after row 0", "copy or download it again"),
    ),
    Bad(
        error="unreadable parquet",
        provoke=damaged_parquet,
        says=Says(
            "damaged.parquet: ",
            "BYTE_ARRAY value",
            "unreadable or truncated parquet after row 1536",
            "copy or download it again",
        ),
    ),
    Bad(
        error="unreadable jsonl",
        provoke=unreadable_jsonl,
        says=Says("torn.jsonl, line 3", "must be text in UTF-8", "got byte 0xff at column 21", "or copy it again"),
    ),
    Bad(
        error="truncated jsonl",
        provoke=cut_jsonl,
        says=Says("cut.jsonl, line 2", "valid JSON", "is the file cut short?", "copy it again, or mend the line"),
    ),
    Bad(
        error="empty dataset after filters",
        provoke=lambda home: home.train(data__max_prompt_tokens=5),
        says=Says(
            "no example is left",
            "max_prompt_tokens=5",
            "kept 0 of 13 problems: 13 prompts too long (e.g. ",
            "raise that limit",
        ),
    ),
    Bad(
        error="fewer problems than a step takes",
        provoke=lambda home: home.train(data__path=home.parquet("single.parquet", [trace_row("What is 1+1?")])),
        says=Says(
            "data: 1 problem of ",
            "a step takes 2 (train.prompts_per_step)",
            "single.parquet",
            "lower it, or bring more problems",
        ),
    ),
    Bad(
        error="prompt longer than the limit",
        provoke=what_a_run_says,
        code=0,
        shows=("kept 12 of 13 problems: 1 prompt too long (e.g. mine/train/12)",),
        needs=("run",),
    ),
    Bad(
        error="model path that does not exist",
        provoke=lambda home: home.train(model__name=home.path / "nowhere"),
        says=Says("model: ", "give the id of a model of Hugging Face's", "there is no folder", "mend its name"),
    ),
    Bad(
        error="model path that lacks a tokenizer",
        provoke=no_tokenizer,
        says=Says(
            "model: the folder", "tokenizer.json", "is not a checkpoint, it lacks a tokenizer", "copy what is missing"
        ),
    ),
    Bad(
        error="model path that lacks a chat template",
        provoke=no_chat_template,
        says=Says(
            "templateless'", "give one as chat_template", "has no chat template", "or use style 'luffy' or 'plain'"
        ),
    ),
    Bad(
        error="vLLM not installed",
        provoke=no_vllm,
        says=Says("rollout: vLLM", "cannot be imported", "No module named 'vllm'", "scripts/setup.sh"),
    ),
    Bad(
        error="vLLM failing to start",
        provoke=no_weights_for_vllm,
        says=Says(
            "rollout: vLLM",
            "failed to start",
            "Error while deserializing header: ",
            "copy the model again if ",
        ),
        leaves="runs/new/",
    ),
    Bad(
        error="non-finite loss or gradient: step skipped, counted",
        provoke=blown_up("skipped", optim__max_bad_steps=9),
        code=0,
        needs=("run",),
        leaves="runs/skipped/",
        after=skipped_steps,
    ),
    Bad(
        error="non-finite loss or gradient: abort with a dump after k in a row",
        provoke=blown_up("wild", optim__max_bad_steps=2),
        says=Says(
            "loss or gradient", "not finite", "2 updates in a row (loss ", "start a new run with a lower optim.lr"
        ),
        needs=("run",),
        leaves="runs/wild/",
        after=dumped_rows,
    ),
    Bad(
        error="full disk while saving",
        provoke=full_disk,
        says=Says(
            "checkpoint: it is not written",
            "earlier ones are as they were",
            "File too large",
            "make room, then --resume",
        ),
        needs=("run",),
        leaves="runs/full/",
        after=three_checkpoints("full"),
    ),
    Bad(
        error="a run folder that already holds a run",
        provoke=lambda home: home.again(run="whole"),
        says=Says("runs/whole", "another --run-dir", "already holds a run", "pass --resume to continue it"),
        needs=("run",),
    ),
]


# --- many ranks -------------------------------------------------------------------------------------------------------


def ranks(count: int, **options: Any):
    """Real ones, each with an exit code of its own."""
    return lambda home: lambda: all_ranks(count, *home.arguments(run="ranks", **options), cwd=home.path)


def launched(count: int, **options: Any):
    """Under the launcher, which ends with the code of the rank that failed first."""
    return lambda home: home.process(*home.arguments("--nproc-per-node", str(count), run="launched", **options))


def over_budget(home: Home):
    row = trace_row("one + " * 10 + "what is 1+1?", number=7)
    data = home.parquet("budget.parquet", [trace_row("What is 1+1?"), row])
    return home.train(data__path=data, train__tokens_per_micro=120)


def of_another_model(home: Home):
    """A checkpoint that was copied from the wrong run."""
    wide = make_narrow_model(home.path / "wide", hidden_size=128)
    assert home.again(run="wide", model__name=wide, train__steps=4)() == 0
    copy = home.copy_of_run("mixed", last=3)
    shutil.copytree(home.path / "runs" / "wide" / "checkpoints" / "step-000004", copy / "checkpoints" / "step-000004")
    return home.again("--resume", run="mixed")


def damage(checkpoint: Path) -> None:
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\xff\x01\x02")


def damaged_checkpoint(home: Home):
    copy = home.copy_of_run("damaged", last=3)
    damage(copy / "checkpoints" / "step-000003")
    return home.again("--resume", run="damaged")


def damaged_checkpoints(home: Home):
    copy = home.copy_of_run("ruined", last=2)
    for folder in (copy / "checkpoints").iterdir():
        damage(folder)
    return home.again("--resume", run="ruined")


def mount_that_loses(home: Home):
    home.copy_of_run("lossy", last=3)
    again, real = home.again("--resume", run="lossy"), saving.put_in_place

    def lossy(temporary: Path, path: Path) -> None:
        real(temporary, path)
        os.truncate(path / "model.safetensors", 1000)

    def act() -> int:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(saving, "put_in_place", lossy)
            return again()

    return act


def mount_that_fills_up(home: Home):
    """Under two ranks that write the third of three checkpoints."""
    copy = home.copy_of_run("filled", last=3)
    files = (copy / "checkpoints" / "step-000003").rglob("*")
    room = sum(path.stat().st_size for path in files if path.is_file()) // 2 // 1024
    rollouts = home.path / "runs" / "whole" / "rollouts"
    again = home.arguments(
        "--resume", run="filled", rollout__engine="replay", rollout__replay=rollouts, eval__token_groups=0
    )

    def act() -> CompletedProcess[str]:
        with small_disk(copy, room) as within:
            return all_ranks(2, *again, cwd=home.path, within=within)

    return act


def two_runs(home: Home):
    busy = RunFolder(home.path / "runs" / "busy")
    start = home.train(run="busy")

    def act() -> int:
        with busy.lock():
            return start()

    return act


RANKS = [
    Bad(
        error="world size that does not divide the mesh",
        provoke=ranks(2, mesh__sequence=3),
        says=Says(
            "mesh: 2 ranks",
            "mesh.replicate 1 x mesh.sequence 3",
            "cannot be split",
            "start a multiple of 3 ranks, or change the mesh",
        ),
    ),
    Bad(
        error="head count not divisible by sp",
        provoke=ranks(3, mesh__sequence=3),
        says=Says("mesh.sequence", "the model's 2 attention heads", "3 ranks cannot share", "take one of 1, 2"),
        slow=True,
    ),
    Bad(
        error="a sequence longer than the model's positions",
        provoke=lambda home: home.train(rollout__max_tokens=600),
        says=Says(
            "model: it has 512 positions",
            "data.max_prompt_tokens + rollout.max_tokens",
            "make 700",
            "lower one of them",
        ),
    ),
    Bad(
        error="a sequence longer than the model's positions, on two ranks of the launcher",
        provoke=launched(2, rollout__max_tokens=600),
        says=Says(
            "model: it has 512 positions",
            "data.max_prompt_tokens + rollout.max_tokens",
            "make 700",
            "lower one of them",
        ),
        slow=True,
    ),
    Bad(
        error="a sequence longer than the budget",
        provoke=over_budget,
        says=Says(
            "problem mine/train/7: its prompt of", "train.tokens_per_micro 120", "tokens, more than", "raise it to"
        ),
    ),
    Bad(
        error="checkpoint of another model",
        provoke=of_another_model,
        says=Says(
            "resume: step-000004 is of another model",
            "64 that of the run's model.name",
            "its hidden_size is 128",
            "take it out of ",
        ),
        needs=("run",),
    ),
    Bad(
        error="a damaged checkpoint",
        provoke=damaged_checkpoint,
        code=0,
        shows=(
            "checkpoint: step-000003 is damaged: the contents of model.safetensors are not what was written",
            "it is skipped, and called damaged-step-000003 from now on",
            "step-000002",
            "step 3/4",
        ),
        needs=("run",),
        leaves="runs/damaged/",
        moves=("damaged/checkpoints/step-000003", "damaged/checkpoints/damaged-step-000003"),
    ),
    Bad(
        error="a damaged checkpoint, and no other",
        provoke=damaged_checkpoints,
        says=Says(
            "resume: none of the checkpoints in",
            "can be used",
            "damaged-step-000002, damaged-step-000001",
            "move them elsewhere",
        ),
        needs=("run",),
        leaves="runs/ruined/",
        moves=("ruined/checkpoints/step-", "ruined/checkpoints/damaged-step-"),
    ),
    Bad(
        error="a mount that loses rename atomicity",
        provoke=mount_that_loses,
        says=Says(
            "checkpoint: step-000004 is damaged",
            "expected",
            "model.safetensors has 1000 bytes",
            "resume on another one",
        ),
        needs=("run",),
        leaves="runs/lossy/",
    ),
    Bad(
        error="a mount that fills up",
        provoke=mount_that_fills_up,
        says=Says(
            "checkpoint: it is not written",
            "earlier ones are as they were",
            "No space left on device",
            "make room, then --resume",
        ),
        needs=("run",),
        leaves="runs/filled/",
        after=three_checkpoints("filled"),
    ),
    Bad(
        error="two runs on one folder",
        provoke=two_runs,
        says=Says("runs/busy", "wait for it", "another process is training in", "or stop it"),
    ),
]
