"""`luffy generate` and `luffy.generate.Model`: through vLLM."""

import json
import subprocess
import sys

import pytest
from test_cli import refused
from tiny import luffy

from luffy.commands.generate import read_questions
from luffy.errors import UserError


@pytest.fixture(scope="module")
def model(home):
    from luffy.generate import Model

    with Model(str(home / "model"), context=200, kv_cache_gib=0.25) as model:
        yield model


def test_answers(model):
    one = model.answer("What is 2+2?", max_tokens=12, seed=3)
    assert one == model.answer([{"role": "user", "content": "What is 2+2?"}], max_tokens=12, seed=3)
    assert one != model.answer("What is 2+2?", max_tokens=12, seed=4)
    assert model.answer("What is 2+2?", max_tokens=5, temperature=0) == model.answer(
        "What is 2+2?", max_tokens=5, temperature=0
    )
    found = model.answers(["What is 2+2?", "And 3+3?"], n=3, max_tokens=6, temperature=1.0)
    assert [len(texts) for texts in found] == [3, 3]
    assert len({text for texts in found for text in texts}) > 1


def test_a_stream_is_the_answer_in_pieces(model):
    for seed in range(4):  # a model that knows nothing writes halves of characters, too
        pieces = list(model.stream("What is 2+2?", max_tokens=40, seed=seed, temperature=1.0))
        assert "".join(pieces) == model.answer("What is 2+2?", max_tokens=40, seed=seed, temperature=1.0)
        assert len(pieces) > 3


def test_more_answers_begin_with_those_that_were_fewer(model):
    """What lets an evaluation use a larger --n again."""
    few, many = (model.answers(["What is 2+2?"], n=n, max_tokens=8, temperature=1.0)[0] for n in (2, 5))
    assert many[:2] == few


def test_one_thing_at_a_time(model):
    """Another request's steps would take a stream's tokens away."""
    stream = model.stream("What is 2+2?", max_tokens=30, temperature=1.0)
    first = next(stream)
    for ask in (lambda: model.answer("And 3+3?", max_tokens=4), lambda: next(model.stream("And 3+3?", max_tokens=4))):
        with pytest.raises(RuntimeError, match="another stream or generation is not over"):
            ask()
    assert first + "".join(stream) == model.answer("What is 2+2?", max_tokens=30, temperature=1.0)


def test_lines_end_where_lines_end(tmp_path):
    """Not at U+2028, which JSON may hold; and a file in Latin-1 is refused by name."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    [(number, turns, _)] = read_questions(path)
    assert (number, turns[-1]["content"]) == (1, "a\u2028b")
    path.write_bytes('{"prompt": "caf\u00e9"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"^generate: .*x.jsonl, line 1: must be text in UTF-8, got byte 0xe9"):
        read_questions(path)
    path.write_text('{"prompt": "\\ud800"}')
    with pytest.raises(UserError, match=r"x.jsonl, line 1: a text holds .*half of a character"):
        read_questions(path)
    for more_than_python_reads in ("[" * 10**6, '{"prompt": ' + "1" * 5000 + "}"):
        path.write_text(more_than_python_reads)
        with pytest.raises(UserError, match=r"x.jsonl, line 1: not valid JSON"):
            read_questions(path)


def test_a_stream_that_is_left_leaves_nothing_behind(model):
    next(model.stream("What is 2+2?", max_tokens=150))
    assert not model.engine.llm.llm_engine.has_unfinished_requests()
    assert model.answer("What is 2+2?", max_tokens=4) == model.answer("What is 2+2?", max_tokens=4)


def test_what_does_not_fit(model):
    with pytest.raises(UserError, match=r"an answer of up to 500 are more than the context of 200"):
        model.answer("What is 2+2?", max_tokens=500)


def test_the_command(home):
    options = ["--model", home / "model", "--max-tokens", "8", "--kv-cache-gib", "0.25"]
    done = luffy("generate", "What is 2+2?", *options, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    command = [sys.executable, "-m", "luffy", "generate", "-", *map(str, options)]
    piped = subprocess.run(command, input="What is 2+2?", capture_output=True, text=True, cwd=home)
    assert piped.stdout == done.stdout
    assert refused(luffy("generate", *options, cwd=home), "QUESTION", "--file")
    assert refused(luffy("generate", "x", "--file", "y", "--out", "z", *options, cwd=home), "QUESTION", "--file")
    assert refused(luffy("generate", "--file", "y", *options, cwd=home), "--out")


def test_what_can_be_refused_before_a_model_is_opened(tmp_path):
    base = ["generate", "--model", "no/model", "--out", "out.jsonl", "--file"]
    gone = luffy(*base, "gone.jsonl", cwd=tmp_path)
    assert gone.stderr == "luffy: generate: there is no file gone.jsonl; mend the path\n"
    assert refused(luffy(*base, ".", cwd=tmp_path), "generate: . is a folder, and a file is read")
    for empty in ("", " \n"):
        assert refused(luffy("generate", empty, "--model", "no/model", cwd=tmp_path), "empty QUESTION", "give a text")


def test_a_file_of_questions_can_be_graded(home):
    rows = [
        {"id": "a", "prompt": "What is 2+2?", "answer": "4"},
        {"id": "b", "prompt": [{"role": "user", "content": "And 3+3?"}], "answer": 6, "more": [1]},
    ]
    (home / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    options = ["--model", home / "model", "--file", "questions.jsonl", "--out", "answers.jsonl", "--max-tokens", "6"]
    done = luffy("generate", *options, "--n", "2", cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in (home / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in found] == [rows[0]["prompt"]] * 2 + [rows[1]["prompt"]] * 2
    assert all(isinstance(row["response"], str) and row["tokens"] <= 6 for row in found)
    assert found[2]["more"] == [1]
    assert not (home / "answers.jsonl.partial").exists()
    graded = luffy("grade", "answers.jsonl", "--grader", "boxed", cwd=home)
    assert "of 4 right" in graded.stdout, graded.stderr


@pytest.mark.slow
def test_a_file_that_cannot_be_asked(home):
    base = ["generate", "--model", home / "model", "--out", "none.jsonl", "--file"]
    (home / "bad.jsonl").write_text('{"prompt": "x"}\n{"question": "y"}\n')
    assert refused(luffy(*base, "bad.jsonl", cwd=home), "bad.jsonl, line 2", "no field `prompt`", "has question")
    (home / "bad.jsonl").write_text('{"prompt": " "}\n')
    assert refused(luffy(*base, "bad.jsonl", cwd=home), "bad.jsonl, line 1", "empty")
    (home / "bad.jsonl").write_text("\n")
    assert refused(luffy(*base, "bad.jsonl", cwd=home), "no lines")
    assert refused(luffy(*base, "no.jsonl", cwd=home), "no.jsonl")
    (home / "good.jsonl").write_text('{"prompt": "x"}\n')
    assert refused(luffy(*base, "good.jsonl", "--max-tokens", "99999", cwd=home), "positions", "lower --max-tokens")
    one = ["generate", "hm", "--model", home / "model", "--max-tokens", "99999"]
    assert refused(luffy(*one, cwd=home), "positions", "lower --max-tokens")
    assert not (home / "none.jsonl").exists()
