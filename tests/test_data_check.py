"""`luffy data check` against files whose every fault is known."""

import json
from pathlib import Path

import pytest
from tiny import luffy, make_tokenizer, write_jsonl

from luffy.data import load_problems
from luffy.data_check import check, histogram, report
from luffy.prompts import PromptTemplate
from luffy.rewards import VerifierPool

LONG = "Anna has three apples and gives one of them to each of her two best friends today"


def write(path: Path, rows: list[tuple[str, str, list[str]]]) -> Path:
    def row(question: str, answer: str, traces: list[str]) -> dict:
        prompt = [{"role": "user", "content": question}]
        return {"prompt": prompt, "reward_model": {"ground_truth": answer, "style": "rule"}, "target_lst": traces}

    return write_jsonl(path, (row(*given) for given in rows))


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    rows = [
        ("1 + 1?", "2", ["It is \\boxed{2}.", "It is \\boxed{3}."]),
        ("What is  2 + 2?", "4", []),
        (f"{LONG}. How many are left?", "1", ["\\boxed{1}"]),
        ("1 + 1 ?", "2", ["\\boxed{2} <|im_end|> and on"]),
    ]
    judged = [("what is 2 + 2", "4", []), (f"{LONG}, and how many has she?", "1", []), ("5 + 5?", "10", [])]
    return write(tmp_path / "train.jsonl", rows), write(tmp_path / "test.jsonl", judged)


def test_every_fault_is_found_and_named(files):
    problems, template = load_problems(files[0]), PromptTemplate(make_tokenizer())
    with VerifierPool("answer", workers=1) as pool:
        found = check(problems, template, pool, {"test": load_problems(files[1])})
    ids = [problem.id for problem in problems]
    assert (found.problems, found.traces, found.without_trace) == (4, 4, 1)
    assert found.verdicts == {"right": 3, "wrong": 1}
    assert found.overlaps == {"test": [ids[1], ids[2]]}
    assert len(found.trace_lengths) == 3
    said = " ".join(found.wrong)
    for words in ("1 trace cannot be learnt from: with an EOS inside",
                  "does not accept 1 of 4 traces", "2 problems are among those of test",
                  "1 question is there more than once"):  # fmt: skip
        assert words in said
    assert ids[0] in found.wrong[1]
    assert found.left_out == {"traces_broken": 1}
    text = "\n".join(report(found, problems[:1], template))
    assert "<|im_start|>user\n1 + 1?<|im_end|>" in text
    assert "It is \\boxed{2}.<|im_end|>" in text  # with the token that ends it
    assert "! 1 trace " in text


def test_what_training_would_leave_out_is_named(tmp_path):
    rows = [
        {"prompt": "1 + 1?", "answer": "2", "traces": ["<think>\n\\boxed{2}", "<think><think></think>\\boxed{2}"]},
        {"prompt": "2 + 2?", "answer": None, "traces": ["\\boxed{4}"]},
        {"prompt": "3 + 3?", "answer": "6", "traces": ["It is what it is.", "\\boxed{6}" + "!" * 60, "\\boxed{5}"]},
        {"prompt": "why" * 30, "answer": "7", "traces": []},
        {"prompt": "\u00ad", "answer": "8", "traces": ["\\boxed{8}\u00ad"]},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer()
    template = PromptTemplate(tokenizer, vocab_size=len(tokenizer) - 1)  # one byte of U+00AD is outside
    limits = {"max_prompt_tokens": 80, "max_trace_tokens": 50}
    with VerifierPool("answer", workers=1) as pool:
        found = check(load_problems(path), template, pool, {}, **limits)
    assert found.without_answer == 1
    assert found.left_out == {
        "without_answer": 1,
        "prompts_too_long": 1,
        "prompts_outside": 1,
        "traces_too_long": 1,
        "traces_unclosed": 1,
        "traces_repeated": 1,
        "traces_outside": 1,
    }
    assert found.verdicts == {"right": 4, "no answer": 1, "wrong": 1}, "nothing is graded where there is no answer"
    said = "\n".join(found.wrong)
    for words in ("1 problem has no verifiable answer, such as mine/1", "1 prompt is too long, such as mine/3",
                  "never closed, such as mine/0", "tag twice, such as mine/0",
                  "outside the model's vocabulary, such as mine/4",
                  "1 trace has no \\boxed{} nor another verifiable answer, such as mine/2"):  # fmt: skip
        assert words in said, words
    opening = PromptTemplate(tokenizer, style="luffy")
    assert check(load_problems(path), opening, None, {}).left_out["traces_open"] == 5


def test_nothing_wrong_is_said_too(tmp_path):
    problems = load_problems(write(tmp_path / "good.jsonl", [("1 + 1?", "2", ["\\boxed{2}"])]))
    template = PromptTemplate(make_tokenizer())
    found = check(problems, template, None, {"itself": []})
    assert (found.wrong, found.verdicts) == ([], {})
    assert list(report(found, problems, template))[-1] == "nothing wrong was found"
    assert check(problems, template, None, {"itself": problems}).overlaps == {"itself": [problems[0].id]}


def test_how_many_words_make_questions_alike(files):
    problems, template = load_problems(files[0]), PromptTemplate(make_tokenizer())
    others = {"test": load_problems(files[1])[1:2]}
    assert check(problems, template, None, others, words=15).overlaps["test"]
    assert not check(problems, template, None, others, words=18).overlaps["test"]


def test_formulas_that_differ_in_an_operator_are_not_the_same(tmp_path):
    template = PromptTemplate(make_tokenizer())
    ours = load_problems(write(tmp_path / "train.jsonl", [(f"7{op}3", "1", []) for op in "+-*/^"]))
    judged = load_problems(write(tmp_path / "test.jsonl", [("7 / 3?", "1", []), ("7.3", "1", [])]))
    found = check(ours, template, None, {"test": judged})
    assert found.overlaps == {"test": [ours[3].id]}
    assert not any("more than once" in sentence for sentence in found.wrong)


def test_what_every_question_says_makes_none_of_them_alike(tmp_path):
    ask = "Think step by step, and put what you find in the end within a box, for it is looked for there."
    template = PromptTemplate(make_tokenizer())
    rows = [*((f"{n} + {n}? {ask}", "1", []) for n in range(20)), (f"{LONG}. {ask}", "1", [])]
    ours = load_problems(write(tmp_path / "train.jsonl", rows))
    judged = load_problems(write(tmp_path / "test.jsonl", [(f"99 + 99? {ask}", "1", []), (f"{LONG}!", "1", [])]))
    assert check(ours, template, None, {"test": judged}).overlaps == {"test": [ours[-1].id]}


def test_a_trace_that_cannot_be_shown_is_no_end(tmp_path):
    problems = load_problems(write(tmp_path / "train.jsonl", [("1 + 1?", "2", ["a <|im_end|> \\boxed{2}"])]))
    template = PromptTemplate(make_tokenizer())
    text = "\n".join(report(check(problems, template, None, {}), problems, template))
    assert "left out: with an EOS inside" in text


def test_bars_show_every_length():
    lines = list(histogram([1, 2, 3, 4, 4, 4, 5, 100]))
    assert [int(line.split()[2]) for line in lines] == [1, 1, 4, 1, 0, 0, 0, 1]
    assert lines[2].count("#") == 40


def test_the_command(files, tmp_path):
    done = luffy("data", "check", files[0], "--against", files[1], cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "traces by the verifier: 3 right, 1 wrong" in done.stdout
    assert "! 2 problems are among those of" in done.stdout
    told = luffy("data", "check", files[0], "--grader", "none", "--limit", "1", "--json", cwd=tmp_path)
    assert told.returncode == 0, told.stdout + told.stderr
    assert json.loads(told.stdout)["problems"] == 1
    for given, words in (("nowhere.jsonl", "nowhere.jsonl"), (files[0], "grader must be among")):
        bad = luffy("data", "check", given, "--grader", "no such", cwd=tmp_path)
        assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
        assert words in bad.stderr
