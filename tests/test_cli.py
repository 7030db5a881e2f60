"""What a user can get wrong: one clear sentence, exit code 2, and nothing touched."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import luffy, make_model

from luffy.config import RolloutConfig
from luffy.rollout.vllm_engine import kv_cache_bytes

GOOD = {
    "data_source": "x",
    "prompt": [{"content": "What is 1+1?", "role": "user"}],
    "target": [{"content": "It is 2.", "role": "assistant"}],
    "ability": "math",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"index": 0, "split": "train"},
}


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


def test_too_few_problems_for_a_step(home):
    refused(train(home, "--data.problems.train", "3"), "3 problems", "a step takes 8 (train.prompts_per_step)")


def test_an_unknown_grader_or_family(home):
    refused(train(home, "--reward.grader", "oracle"), "oracle", "answer")
    refused(train(home, "--reward.grader", "nowhere:grade"), "nowhere:grade", "No module named")
    (home / "slip.py").write_text("def grade(:\n")
    refused(train(home, "--reward.grader", "slip:grade"), "slip:grade", "invalid syntax")
    refused(train(home, "--data.problems.families", '{"sums": {}}'), "sums", "digit_sum")


@pytest.mark.parametrize(("gib", "size"), [(None, 2**30), (0.25, 2**28)])
def test_the_kv_cache_on_a_cpu_has_a_size_of_its_own(gib, size, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert kv_cache_bytes(RolloutConfig(kv_cache_gib=gib)) == size
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert kv_cache_bytes(RolloutConfig(kv_cache_gib=gib)) == (None if gib is None else size)


def test_vllm_that_is_built_for_another_torch(home):
    (home / "shadow" / "vllm").mkdir(parents=True)
    (home / "shadow" / "vllm" / "__init__.py").write_text("raise RuntimeError('built for another torch')")
    asked = ("generate", "?", "--max-tokens", "8", "--model", home / "model")
    done = luffy(*asked, cwd=home, PYTHONPATH=str(home / "shadow"))
    refused(done, "vLLM cannot be imported", "setup.sh", "built for another torch")
