"""Every error that the features list as bad input, one after the other, provoked for real: one sentence says what it is
about, what would be right, what is there and what to do; the exit code is 2; and nothing is lost."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch.distributed as dist
from bad_calls import CALLS, HEADS
from bad_inputs import (
    CONTEXT,
    GOOD,
    STEPS,
    Bad,
    Home,
    Says,
    largest_file,
    make_narrow_model,
    processes,
    snapshot,
    trace_row,
)
from tiny import make_tokenizer

from luffy import checkpoint, distributed
from luffy.config import MeshConfig, RolloutConfig
from luffy.data import Problem, tokenize
from luffy.errors import UserError
from luffy.objectives import make_objective, options_of
from luffy.prompts import PromptTemplate
from luffy.rollout.engine import Request, generate
from luffy.rollout.servers import Servers
from luffy.run_folder import RunFolder

pytestmark = pytest.mark.timeout(600)  # whoever is first to need the server and the run waits for both

SIZES = {"vocabulary": 258, "hidden size": 64, "blocks": 2}

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


def no_vllm(home: Home):
    shadow = home.path / "shadow" / "vllm"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text("raise ImportError('No module named vllm')")
    return home.process("generate", "?", "--max-tokens", "4", "--model", home.model, PYTHONPATH=str(shadow.parent))


def no_weights_for_vllm(home: Home):
    folder = shutil.copytree(home.model, home.path / "torn")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return home.process("generate", "?", "--max-tokens", "4", "--model", folder)


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


A = [
    Bad(
        error="missing dataset column",
        provoke=without_column,
        says=Says(
            "missing.parquet: column 'reward_model'",
            "expected prompt and reward_model",
            "is missing, the nearest column present is",
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
        says=Says("cut.parquet", "parquet", "truncated parquet after row 0", "copy or download it again"),
    ),
    Bad(
        error="unreadable parquet",
        provoke=damaged_parquet,
        says=Says(
            "damaged.parquet", "parquet", "unreadable or truncated parquet after row 1536", "copy or download it again"
        ),
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
        error="prompt longer than the limit",
        provoke=what_a_run_says,
        code=0,
        shows=("kept 12 of 13 problems: 1 prompts too long (e.g. mine/train/12)",),
        needs=("run",),
    ),
    Bad(
        error="model path that does not exist",
        provoke=lambda home: home.train(model__name=home.path / "nowhere"),
        says=Says("model: ", "folder", "there is no folder", "mend its name, or give the id of a model"),
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
        says=Says("templateless", "chat template", "has no chat template", "or use style 'luffy' or 'plain'"),
    ),
    Bad(
        error="vLLM not installed",
        provoke=no_vllm,
        says=Says("rollout: vLLM", "cannot be imported", "No module named vllm", "scripts/setup.sh"),
    ),
    Bad(
        error="vLLM failing to start",
        provoke=no_weights_for_vllm,
        says=Says("rollout: vLLM", "failed to start", "Error while deserializing header: ", "incomplete metadata"),
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
    """Real ones, under the launcher."""
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
    again, real = home.again("--resume", run="lossy"), checkpoint.put_in_place

    def lossy(temporary: Path, path: Path) -> None:
        real(temporary, path)
        os.truncate(path / "model.safetensors", 1000)

    def act() -> int:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(checkpoint, "put_in_place", lossy)
            return again()

    return act


def two_runs(home: Home):
    busy = RunFolder(home.path / "runs" / "busy")
    start = home.train(run="busy")

    def act() -> int:
        with busy.lock():
            return start()

    return act


C = [
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
        error="a sequence longer than the model's positions, on two ranks",
        provoke=ranks(2, rollout__max_tokens=600),
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
        error="damaged checkpoints, all of them",
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
        error="two runs on one folder",
        provoke=two_runs,
        says=Says("runs/busy", "wait for it", "another process is training in", "or stop it"),
    ),
]

# --- rollouts ---------------------------------------------------------------------------------------------------------


def ask(home: Home, url: str, model: Path, *more: str):
    options = ["--max-tokens", "4", "--out", home.path / "evals", *more]
    return home.cli("eval", "--data", home.asked, "--model", model, "--urls", url, *options)


def another(name: str, **sizes: int):
    return lambda home: ask(home, home.url, make_narrow_model(home.path / name, **sizes))


def version_skew(home: Home):
    start = ask(home, home.url, home.model)

    def act() -> int:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("luffy.versions.of_rollouts", lambda: {"vLLM": "0.33.0"})
            return start()

    return act


def refused_prompt(home: Home):
    config = RolloutConfig(engine="server", urls=[home.url])
    about = {"dtype": "float32", "eos_token_id": 2, "sizes": SIZES, "max_model_len": CONTEXT}
    requests = [Request((5,) * tokens, 1, 4, tokens) for tokens in (9, CONTEXT + 1)]

    def act() -> int:
        world = distributed.start(MeshConfig())
        try:
            with Servers(str(home.model), config, **about, folder=home.path / "asking", world=world) as servers:
                assert [len(answers) for answers in generate(servers, requests, 1.0)] == [1, 0]
                assert servers.metrics()["rollout/refused"] == 1
        finally:
            distributed.close()
        return 0

    return act


D = [
    Bad(
        error="server of another model",
        provoke=another("deep", num_hidden_layers=3),
        says=Says(
            "rollout: http://127.0.0.1:",
            "and the trainer's 3",
            "has another model: its blocks is 2",
            "start it with the run's model.name",
        ),
        needs=("server",),
        leaves="evals/",
    ),
    Bad(
        error="server of another vocabulary",
        provoke=another("worded", vocab_size=300),
        says=Says(
            "rollout: http://127.0.0.1:",
            "and the trainer's 300",
            "has another model: its vocabulary is 258",
            "start it with the run's model.name",
        ),
        needs=("server",),
        leaves="evals/",
    ),
    Bad(
        error="unreachable URL",
        provoke=lambda home: ask(home, "http://127.0.0.1:1", home.model),
        says=Says("http://127.0.0.1:1", "server", "no server answers at", "start it, or mend rollout.urls (--urls)"),
        leaves="evals/",
    ),
    Bad(
        error="version skew",
        provoke=version_skew,
        says=Says("rollout: http://127.0.0.1:", "and the trainer 0.33.0", "runs vLLM ", "install the same on both"),
        needs=("server",),
        leaves="evals/",
    ),
    Bad(
        error="too little memory for KV at the requested context",
        provoke=lambda home: home.process(
            "generate", "?", "--max-tokens", "300", "--kv-cache-gib", "4e-5", "--model", home.model
        ),
        says=Says(
            "one sequence of ", " GiB of KV cache and there are ", " GiB are missing", "raise rollout.kv_cache_gib to"
        ),
    ),
    Bad(
        error="a prompt that vLLM rejects",
        provoke=refused_prompt,
        code=0,
        shows=("rollout: 1 prompts were refused and are skipped: ",),
        needs=("server",),
    ),
]

# --- objectives and data ----------------------------------------------------------------------------------------------


def told(home: Home):
    """What `luffy data check` says, after what training has said of the same problems."""
    options = ["--model", home.model, "--max-prompt-tokens", "100", "--max-trace-tokens", "100"]
    check = home.cli("data", "check", home.data, *options)

    def act() -> int:
        print((home.path / "whole.out").read_text())
        return check()

    return act


def other_log_probs(home: Home):
    tokens = len(GOOD.encode()) + 1
    rows = [trace_row(f"{n}: what is 1+1?", number=n, target_logps=[[-0.1] * (tokens + n)]) for n in (-1, 0, 1)]
    return home.train(data__path=home.parquet("scored.parquet", rows))


def no_traces(home: Home):
    row = trace_row("What is 1+1?")
    del row["target"]
    return home.train(data__path=home.parquet("bare.parquet", [row, row]))


def learns_from_traces(name: str):
    def provoke(home: Home):
        template = PromptTemplate(make_tokenizer())
        turns = ({"role": "user", "content": "What is 1+1?"},)
        problems = [Problem(id=f"p{n}", data_source="s", messages=turns, answer="2", traces=()) for n in range(2)]
        examples, _ = tokenize(problems, template, max_prompt_tokens=100, max_trace_tokens=100)
        return lambda: make_objective(options_of(name)()).prepare(examples)

    return Bad(
        error=f"an objective given data it cannot use: {name}",
        provoke=provoke,
        says=Says(
            f"objective: {name}", "learns from traces", "none of the 2 problems has one", "bring data with traces"
        ),
    )


E = [
    Bad(
        error="a trace without a verifiable answer",
        provoke=told,
        code=1,
        shows=("2 traces have no \\boxed{} nor another verifiable answer, such as mine/train/10, mine/train/11",),
        needs=("run",),
    ),
    Bad(
        error="a trace with the tag twice",
        provoke=told,
        code=1,
        shows=(
            "2 with a think tag twice (e.g. mine/train/2)",
            "2 traces cannot be learnt from: with a think tag twice, such as mine/train/2, mine/train/3",
        ),
        needs=("run",),
    ),
    Bad(
        error="a trace with the tag never closed",
        provoke=told,
        code=1,
        shows=(
            "2 with a think tag that is never closed (e.g. mine/train/4)",
            "2 traces cannot be learnt from: with a think tag that is never closed, such as mine/train/4, mine/train/5",
        ),
        needs=("run",),
    ),
    Bad(
        error="a trace with tokens outside the vocabulary",
        provoke=told,
        code=1,
        shows=(
            "2 with tokens outside the model's vocabulary (e.g. mine/train/6)",
            "2 traces cannot be learnt from: with tokens outside the model's vocabulary, such as mine/train/6",
        ),
        needs=("run",),
    ),
    Bad(
        error="a trace longer than the limit",
        provoke=told,
        code=1,
        shows=(
            "kept 4 of 12 traces: 2 too long",
            "2 traces cannot be learnt from: too long, such as mine/train/8, mine/train/9",
        ),
        needs=("run",),
    ),
    Bad(
        error="target probabilities of another length than the trace",
        provoke=other_log_probs,
        says=Says(
            "mine/train/-1: trace 1 has",
            "EOS included",
            "2 of 3 traces have other teacher log-probs than tokens",
            "score them with this model's tokenizer and prompt style (luffy data score)",
        ),
    ),
    Bad(
        error="an objective given data it cannot use: luffy on a set with no traces",
        provoke=no_traces,
        says=Says(
            "objective: luffy",
            "learns from traces",
            "none of the 2 problems has one that it may take",
            "bring data with traces (target), raise data.max_trace_tokens, or choose another one",
        ),
    ),
    *map(learns_from_traces, ["sft", "rl_sft", "bread", "relift", "sort"]),
    Bad(
        error="an objective given data it cannot use: teachers' log-probs that nobody gives",
        provoke=lambda home: home.train(objective__off_policy="shaped_teacher"),
        says=Says(
            "objective: off_policy 'shaped_teacher'",
            "compares with the teacher",
            "of 4 problems with traces none has its log-probs (target_logps)",
            "run luffy data score, or take shaped",
        ),
    ),
]

# --- evaluation -------------------------------------------------------------------------------------------------------


def odd_gold(home: Home):
    home.jsonl("odd.jsonl", [{"prompt": "?", "answer": "$ $"}, {"prompt": "!", "answer": "3"}])
    options = ["--max-tokens", "2", "--out", home.path / "golds", "--urls", home.url]
    return home.cli("eval", "--data", home.path / "odd.jsonl", "--model", home.model, *options)


def graded(name: str, *rows: dict[str, Any]):
    good = {"response": "\\boxed{1}", "answer": "1"}

    def provoke(home: Home):
        file = home.jsonl(f"{name}.jsonl", [good | {"id": 0}, *(good | row for row in rows)])
        file.write_text(file.read_text().replace('"response": null, ', ""))
        return home.cli("grade", file, "--grader", "boxed", "--out", home.path / "graded.jsonl")

    return provoke


def offline_suite(home: Home):
    return home.cli("eval", "--suite", "math", "--model", home.model, "--out", home.path / "none")


F = [
    Bad(
        error="gold that cannot be parsed",
        provoke=odd_gold,
        code=0,
        shows=("`boxed` does not accept 1 of the answers word by word: odd/0 ('$ $')",),
        needs=("server",),
        leaves="golds/",
    ),
    Bad(
        error="duplicate ids",
        provoke=graded("twice", {"id": 1}, {"id": 1}),
        says=Says("twice.jsonl:3", "ids must differ", "id 1 is also that of line 2", "or `sample`"),
    ),
    Bad(
        error="predictions file with missing fields",
        provoke=graded("holes", {"response": None}),
        says=Says(
            "holes.jsonl:2: no field `response`", "needs `response` and `answer`", "has answer", "add it, or rename one"
        ),
    ),
    Bad(
        error="a suite that cannot be downloaded",
        provoke=offline_suite,
        says=Says("AIME 2024", "with the columns", "cannot be downloaded (", "place its rows at "),
    ),
    Bad(
        error="a model without chat template",
        provoke=lambda home: home.cli(
            "eval", "--data", home.asked, "--model", without_template(home, "mute-eval"), "--out", home.path / "none"
        ),
        says=Says("mute-eval", "chat template", "has no chat template", "(--template of a command)"),
    ),
]


LISTED = [*A, *C, *D, *E, *F]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[Home]:
    with pytest.MonkeyPatch.context() as patched:
        path = tmp_path_factory.mktemp("home")
        patched.setenv("LUFFY_CACHE", str(path / "cache"))
        patched.chdir(path)
        made = Home(path, patched)
        yield made
        made.close()


@pytest.mark.parametrize(
    "bad",
    [pytest.param(bad, id=bad.error, marks=[pytest.mark.slow] if bad.slow else []) for bad in LISTED],
)
def test_every_listed_error(bad: Bad, home: Home, capfd):
    for name in bad.needs:
        getattr(home, name)
    act = bad.provoke(home)
    before, running = snapshot(home.path), processes(home.path)
    capfd.readouterr()
    try:
        done = act()
    except UserError as error:  # of what no command reaches alone
        done = CompletedProcess((), 2, "", f"luffy: {error}\n")
    said = capfd.readouterr()
    if isinstance(done, CompletedProcess):
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code, out, err = done, said.out, said.err
    assert code == bad.code, (out + err)[-3000:]
    assert "Traceback" not in out + err
    if bad.says:
        *progress, sentence = err.splitlines()
        assert sentence.startswith("luffy: "), err
        assert not any(line.startswith("luffy: ") for line in progress), err
        for part, words in bad.says._asdict().items():
            assert words in sentence, f"{part} is not in: {sentence}"
    for words in bad.shows:
        assert words in out + err, (out + err)[-3000:]
    bad.after(home)
    assert bad.loses(before, snapshot(home.path)) == []
    assert processes(home.path) <= running
    assert not dist.is_initialized()


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.error) for bad in (*CALLS, *HEADS)])
def test_every_listed_error_of_a_call(bad):
    bad.provoke()
