"""`luffy data score`: a teacher's log-probs of stored traces, by real vLLM, against transformers in fp32."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import luffy, make_model, make_tokenizer, write_jsonl
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from luffy.data import load_problems
from luffy.errors import UserError
from luffy.prompts import CHATML, PromptTemplate
from luffy.score import score_file
from luffy.teacher import Teacher, template_of

KV = ("--kv-cache-gib", "0.25", "--dtype", "float32")


def row(question: str, target: str | None, *more: str, **columns) -> dict:
    turns = [{"role": "user", "content": question}]
    first = {"target": [{"role": "assistant", "content": target}]} if target else {}
    return {"prompt": turns, "reward_model": {"ground_truth": "2", "style": "rule"}, **first,
            "target_lst": list(more), **columns}  # fmt: skip


ROWS = [
    row("1 + 1?", "It is \\boxed{2}.", "Two.", "It is \\boxed{2}.", note="kept"),
    row("2 - 0?", None, "2<|im_end|> and on", "x" * 600),
    row("4 / 2?", None),
    row("3 - 1?", "two, as 3 - 1 = 2"),
]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def truth(model: Path, prompt: list[int], trace: list[int]) -> list[float]:
    """Log-probs of the trace's tokens, in one forward pass of transformers."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logp = lm(torch.tensor([prompt + trace])).logits[0].double().log_softmax(-1)
    return [logp[len(prompt) + at - 1, token].item() for at, token in enumerate(trace)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("home") / "teacher-7b")


def command(file: Path, model: Path, out: Path, *more: str) -> list[str]:
    return ["data", "score", str(file), "--model", str(model), "--student", str(model), "--out", str(out), *KV, *more]


@pytest.fixture(scope="module")
def scored(model) -> Path:
    file, out = write_jsonl(model.parent / "in.jsonl", ROWS), model.parent / "out.jsonl"
    before = file.read_bytes()
    done = luffy(*command(file, model, out), cwd=model.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "6 traces, 4 scored, " in done.stdout
    assert "1 with an EOS inside, 1 too long" in done.stdout
    assert file.read_bytes() == before
    assert not (model.parent / "out.jsonl.parts").exists()
    return out


def test_scores_are_transformers_log_probs_in_fp32(model, scored):
    template, found = PromptTemplate(make_tokenizer()), read(scored)
    for given, new in zip(ROWS, found, strict=True):
        texts = [turn["content"] for turn in given.get("target", [])] + given["target_lst"]
        assert {name: value for name, value in new.items() if name not in ("target_teachers", "target_logps")} == given
        assert new["target_teachers"] == ["teacher-7b"] * len(texts)
        for text, logps in zip(texts, new["target_logps"], strict=True):
            if len(text) > 500 or "<|im_end|>" in text:
                assert logps == []
                continue
            expected = truth(model, template.encode_prompt(given["prompt"]), template.encode_trace(text))
            assert logps == pytest.approx(expected, abs=2e-4)
    assert load_problems(scored)[0].traces == ("It is \\boxed{2}.", "Two.")


def test_parquet_keeps_its_columns_and_a_teacher_is_asked_for_its_own_traces_alone(model, tmp_path):
    rows = [row("1 + 1?", "Two.", "2", target_teachers=["ann", "teacher-7b"], target_logps=[[-1.0] * 5, []], extra=7)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    done = luffy(*command(tmp_path / "in.parquet", model, tmp_path / "out.parquet"), cwd=model.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    [found] = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert (found["extra"], found["target_teachers"]) == (7, ["ann", "teacher-7b"])
    template = PromptTemplate(make_tokenizer())
    expected = truth(model, template.encode_prompt(rows[0]["prompt"]), template.encode_trace("2"))
    assert found["target_logps"][0] == [-1.0] * 5
    assert found["target_logps"][1] == pytest.approx(expected, abs=2e-4)


@pytest.mark.slow
def test_killed_and_gone_on_with_it_gives_the_same_bytes(model, tmp_path):
    """600 rows, five parts, killed once one of them is there."""
    file = write_jsonl(
        tmp_path / "in.jsonl", [row(f"{n} + 1?", f"It is {n + 1}, for {n} + 1 = {n + 1}.") for n in range(600)]
    )
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    done = luffy(*command(file, model, whole), cwd=model.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    begun = subprocess.Popen(
        [sys.executable, "-m", "luffy", *command(file, model, torn)], cwd=model.parent, stdout=subprocess.DEVNULL
    )
    parts = tmp_path / "torn.jsonl.parts"
    deadline = time.monotonic() + 200
    while not list(parts.glob("part-*")):
        assert begun.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(begun.pid, signal.SIGKILL)
    begun.wait()
    assert parts.is_dir()
    assert not torn.exists()
    kept = {part.name: part.stat().st_mtime_ns for part in parts.glob("part-*")}
    assert 0 < len(kept) < 5

    other = luffy(*command(file, model, torn, "--teacher", "ann"), cwd=model.parent)
    assert (other.returncode, "is of a call with another teacher" in other.stderr) == (2, True)
    done = luffy(*command(file, model, torn), cwd=model.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torn.read_bytes() == whole.read_bytes()
    assert not parts.exists()


def merged_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny one with one merge: a token that it writes as one where the other writes two."""
    core = json.loads(make_tokenizer().backend_tokenizer.to_str())
    core["model"]["merges"] = [["b", "o"]]
    core["model"]["vocab"]["bo"] = len(core["model"]["vocab"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)), eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def no_engine(max_model_len: int):
    raise AssertionError("an engine was started")


def teacher_with(tokenizer, folder: Path, own: str | None = None, **options) -> Teacher:
    tokenizer.save_pretrained(folder)
    student = PromptTemplate(make_tokenizer())
    template = template_of(str(folder), student, own)
    return Teacher(name="ann", identity="0", student=student, template=template, own_prompt=bool(own), **options)


def test_a_tokenizer_with_another_merge_is_refused_with_the_first_difference(tmp_path):
    file = write_jsonl(tmp_path / "in.jsonl", ROWS)
    teacher = teacher_with(merged_tokenizer(), tmp_path / "other")
    with pytest.raises(UserError) as error:
        score_file(file, tmp_path / "out.jsonl", teacher, no_engine)
    assert "a trace of in/default/0" in str(error.value)
    at = len(make_tokenizer().encode("It is \\")) + 1
    assert f"first at token {at}: " in str(error.value)
    assert "'b'" in str(error.value)
    assert "'bo'" in str(error.value)
    assert not list(tmp_path.glob("out*"))


def test_a_teacher_that_ends_answers_with_another_token_is_asked_for_that_one(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    teacher = teacher_with(tokenizer, tmp_path / "other")
    [problem] = load_problems(write_jsonl(tmp_path / "in.jsonl", ROWS[:1]))
    prompt, trace = teacher.sequence(problem, "Two.<|im_end|>")
    student = teacher.student
    assert prompt == tuple(student.encode_prompt(problem.messages))
    assert trace == (*student.encode_trace("Two.")[:-1], tokenizer.eos_token_id)
    assert trace[-1] != student.eos_token_id


def test_a_teacher_may_see_prompts_as_its_own_template_writes_them(tmp_path):
    teacher = teacher_with(make_tokenizer(), tmp_path / "other", own="plain")
    [problem] = load_problems(write_jsonl(tmp_path / "in.jsonl", ROWS[:1]))
    prompt, _ = teacher.sequence(problem, "Two.")
    assert teacher.template.tokenizer.decode(list(prompt)) == "1 + 1?\n"
    with pytest.raises(UserError, match="opens the think block .* give a --teacher-template"):
        teacher_with(make_tokenizer(), tmp_path / "other", own="luffy")


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("none.jsonl", "out.jsonl", "none.jsonl must be"),
        ("in.jsonl", "out.parquet", "must end in .jsonl"),
        ("in.jsonl", "in.jsonl", "exists already"),
        ("gsm8k.jsonl", "out.jsonl", "no column 'prompt'"),
        ("others.jsonl", "out.jsonl", "the file's teachers are bob"),
    ],
)
def test_what_cannot_be_scored_is_said_in_a_sentence(source, target, words, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", ROWS)
    write_jsonl(tmp_path / "gsm8k.jsonl", [{"question": "1 + 1?", "answer": "2\n#### 2"}])
    write_jsonl(tmp_path / "others.jsonl", [row("1 + 1?", "2", target_teachers=["bob"])])
    teacher = teacher_with(make_tokenizer(), tmp_path / "other")
    with pytest.raises(UserError, match=words):
        score_file(tmp_path / source, tmp_path / target, teacher, no_engine)
    shutil.rmtree(tmp_path / "other")
