"""What a user can get wrong: one clear sentence, exit code 2, and nothing touched."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import luffy, make_model

from luffy.config import RolloutConfig
from luffy.rollout.vllm_engine import kv_cache_bytes
from luffy.run_folder import RunFolder

GOOD = {
    "data_source": "x",
    "prompt": [{"content": "What is 1+1?", "role": "user"}],
    "target": [{"content": "It is 2.", "role": "assistant"}],
    "ability": "math",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"index": 0, "split": "train"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make_model(home / "model")
    return home


def refused(done, *words):
    """Exit code 2, and one sentence at the end of stderr, after what was said of progress."""
    assert done.returncode == 2, (done.stdout + done.stderr)[-3000:]
    assert done.stderr.count("luffy: ") == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("luffy: "), done.stderr
    for word in words:
        assert word in last
    return True


def train(home, *more, run="run"):
    base = ["train", "quickstart", "--run-dir", home / run, "--model.name", home / "model"]
    return luffy(*base, "--rollout.kv_cache_gib=0.25", *more, cwd=home)


def test_help_is_for_people(home):
    done = luffy("train", "--help", cwd=home)
    assert done.returncode == 0
    assert "--optim.lr" in done.stdout
    assert "luffy-qwen2.5-math-7b" in done.stdout
    assert luffy("--help", cwd=home).returncode == 0


def test_unknown_key_and_recipe(home):
    refused(train(home, "--optim.lrr", "1"), "did you mean --optim.lr?")
    refused(luffy("train", "quickstrt", cwd=home), "did you mean quickstart")
    assert not (home / "run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row.pop("reward_model"), ["reward_model"]),
        (lambda row: row.update(prompts=row.pop("prompt")), ["prompt"]),
    ],
)
def test_a_missing_or_renamed_column_is_named(home, change, words):
    row = json.loads(json.dumps(GOOD))
    change(row)
    pq.write_table(pa.Table.from_pylist([row]), home / "bad.parquet")
    refused(train(home, "--data.path", home / "bad.parquet"), "bad.parquet", *words)


def test_truncated_files_are_named_with_the_row(home):
    pq.write_table(pa.Table.from_pylist([GOOD] * 50), home / "whole.parquet")
    (home / "cut.parquet").write_bytes((home / "whole.parquet").read_bytes()[:-50])
    refused(train(home, "--data.path", home / "cut.parquet"), "cut.parquet")
    (home / "cut.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:40] + "\n")
    refused(train(home, "--data.path", home / "cut.jsonl"), "cut.jsonl", "2")


def test_nothing_left_after_the_filters(home):
    refused(train(home, "--data.max_prompt_tokens", "5"), "2000", "too long")


def test_a_split_that_is_not_there(home):
    pq.write_table(pa.Table.from_pylist([GOOD]), home / "one.parquet")
    refused(train(home, "--data.path", home / "one.parquet", "--data.split", "dev"), "one.parquet", "'dev'", "train")
    done = luffy("eval", "--data", home / "one.parquet", "--split", "dev", "--model", home / "model", cwd=home)
    refused(done, "'dev'")


def test_code_that_comes_with_a_model_is_not_run(home):
    folder = make_model(home / "foreign")
    (folder / "evil.py").write_text(f"open({str(home / 'was-run')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.Evil"}}))
    done = train(home, "--model.name", folder, run="foreign-run")
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.splitlines()[-1].startswith("luffy: ")  # transformers warns before
    assert not (home / "was-run").exists()


def test_too_few_problems_for_a_batch(home):
    refused(train(home, "--data.problems.train", "3"), "batch_size", "3")


def test_models_that_cannot_be_used(home):
    done = luffy("train", "quickstart", "--model.name", home / "nowhere", cwd=home)
    refused(done, "nowhere")
    make_model(home / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (home / "mute" / name).unlink(missing_ok=True)
    refused(train(home, "--model.name", home / "mute"), "mute", "tokenizer")
    make_model(home / "templateless")
    (home / "templateless" / "chat_template.jinja").unlink()
    recipe = home / "no-template.toml"  # the quickstart recipe brings a template of its own
    recipe.write_text(f'[model]\nname = "{home / "templateless"}"\n')
    refused(luffy("train", recipe, cwd=home), "chat template")


def test_an_unknown_grader_or_family(home):
    refused(train(home, "--reward.grader", "oracle"), "oracle", "answer")
    refused(train(home, "--reward.grader", "nowhere:grade"), "nowhere:grade", "No module named")
    (home / "slip.py").write_text("def grade(:\n")
    refused(train(home, "--reward.grader", "slip:grade"), "slip:grade", "invalid syntax")
    refused(train(home, "--data.problems.families", '{"sums": {}}'), "sums", "digit_sum")


def test_a_folder_that_another_process_trains_in(home):
    with RunFolder(home / "busy").lock():
        refused(train(home, run="busy"), "busy", "another process is training")


@pytest.mark.parametrize(("gib", "size"), [(None, 2**30), (0.25, 2**28)])
def test_the_kv_cache_on_a_cpu_has_a_size_of_its_own(gib, size, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert kv_cache_bytes(RolloutConfig(kv_cache_gib=gib)) == size
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert kv_cache_bytes(RolloutConfig(kv_cache_gib=gib)) == (None if gib is None else size)


def test_vllm_that_does_not_start_is_quoted(home):
    done = train(home, "--rollout.kv_cache_gib", "1e-6", run="small")
    assert done.returncode == 2
    assert "vLLM failed to start" in done.stderr.splitlines()[-1]


def test_vllm_that_is_not_installed(home):
    (home / "shadow" / "vllm").mkdir(parents=True)
    for failure in ("ImportError('No module named vllm')", "RuntimeError('built for another torch')"):
        (home / "shadow" / "vllm" / "__init__.py").write_text(f"raise {failure}")
        asked = ("generate", "?", "--max-tokens", "8", "--model", home / "model")
        done = luffy(*asked, cwd=home, PYTHONPATH=str(home / "shadow"))
        refused(done, "vLLM cannot be imported", "setup.sh", failure.split("'")[1])


def test_numbers_that_blow_up_stop_the_run_with_a_dump(home):
    options = ["--optim.lr=1e30", "--optim.warmup_steps=0", "--train.steps=9", "--train.prompts_per_step=2"]
    options += ["--rollout.max_tokens=8", "--eval.every=0", "--data.problems.heldout=4", "--data.problems.ood=1"]
    done = train(home, *options, run="wild")
    assert done.returncode == 2, done.stderr[-3000:]
    assert "not finite 3 updates in a row" in done.stderr.splitlines()[-1]
    [dump] = (home / "wild").glob("dump-step-*.json")
    assert {"prompt_ids", "token_ids", "reward", "advantage"} <= json.loads(dump.read_text())[0].keys()
    bad = [json.loads(line)["actor/bad_updates"] for line in (home / "wild" / "metrics.jsonl").read_text().splitlines()]
    assert bad[-1] == 1
