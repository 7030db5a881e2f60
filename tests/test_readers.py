"""Every schema that problems come in: its columns tell it apart, and a row that does not fit is named."""

import math
from pathlib import Path

import pytest
from tiny import write_jsonl

from luffy.data import DataError, load_problems
from luffy.data.schemas import SCHEMAS, find_schema

USER = {"role": "user", "content": "What is 6*7?"}
ASSISTANT = {"role": "assistant", "content": "6*7 is \\boxed{\\frac{84}{2}}."}
OPENR1 = {
    "problem": "What is 6*7?",
    "solution": "by hand",
    "answer": "42",
    "problem_type": "Algebra",
    "source": "olympiads",
    "uuid": "u-1",
    "is_reasoning_complete": [True, True, False, True],
    "generations": ["<think>\na</think>\\boxed{42}", "wrong", "cut", "<think>\na</think>\\boxed{42}"],
    "correctness_math_verify": [True, False, True, True],
    "correctness_llama": None,
    "messages": [USER, ASSISTANT],
}


def write(folder: Path, *rows: dict) -> Path:
    return write_jsonl(folder / "mine.jsonl", rows)


def load(folder: Path, *rows: dict) -> list:
    return load_problems(write(folder, *rows))


def test_columns_tell_schemas_apart():
    turns = {"messages", "source"}
    found = {
        "luffy": {"prompt", "reward_model", "answer"},
        "openr1": set(OPENR1),
        "numina": {"problem", "solution"} | turns,
        "chat": turns,
        "plain": {"prompt", "answer"},
        "gsm8k": {"question", "answer"},
    }
    names = {name: find_schema(columns, "here").name for name, columns in found.items()}
    assert names == dict(zip(found, found, strict=True))
    assert list(found) == [schema.name for schema in SCHEMAS]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["problem", "generation"], "here: column 'generations' is missing, the nearest .* is 'generation'; expected"),
        (["prompts", "answer"], "column 'prompt' is missing, the nearest column present is 'prompts'; expected"),
        (["prompt", "answer", "trace"], "column 'trace' is unknown, is it 'traces'"),
        (["conversations"], "column .* is missing, the columns present are 'conversations'"),
        ([*OPENR1.keys() - {"is_reasoning_complete"}, "is_reasoning_completed"], "is it 'is_reasoning_complete'"),
        (["x", "y"], "here: column .* is missing, the columns present are 'x', 'y'; expected"),
        ([], "here: column .* is missing, there are no columns"),
    ],
)  # fmt: skip
def test_unknown_columns_name_the_nearest(columns, message):
    with pytest.raises(DataError, match=message):
        find_schema(columns, "here")


def test_openr1s_generations_that_are_right_and_complete_are_traces(tmp_path):
    plain = {key: value for key, value in OPENR1.items() if key not in ("correctness_math_verify", "uuid")}
    marked, nothing, unmarked = load(tmp_path, OPENR1, OPENR1 | {"correctness_math_verify": None}, plain)
    assert (marked.id, marked.answer, marked.data_source) == ("mine/u-1", "42", "openr1")
    assert marked.messages == (USER,)
    assert marked.traces == ("<think>\na</think>\\boxed{42}",)
    assert marked.extra == {"uuid": "u-1", "source": "olympiads", "problem_type": "Algebra"}
    assert nothing.traces == (), "marks that are null are not marks of success"
    assert unmarked.traces == ("<think>\na</think>\\boxed{42}", "wrong"), "a column that is absent says nothing"
    assert unmarked.id == "mine/2"


def test_numina_takes_gold_from_the_answer_or_the_last_box(tmp_path):
    base = {"problem": "What?", "solution": "\\boxed{1}, so \\boxed{\\frac{1}{2}}", "source": "amc"}
    boxed, given, proof, bare = load(
        tmp_path, base, base | {"answer": "0.5"}, base | {"answer": "proof"}, base | {"solution": "clear"}
    )
    assert [one.answer for one in (boxed, given, proof, bare)] == ["\\frac{1}{2}", "0.5", "", ""]
    assert (boxed.traces, boxed.data_source) == ((base["solution"],), "amc")
    assert bare.traces == ("clear",)


def test_plain_rows_are_written_by_hand(tmp_path):
    text, turns, bare = load(
        tmp_path,
        {"prompt": "What is 6*7?", "answer": "42", "traces": ["a", "", "b", "a"]},
        {"prompt": [{"role": "system", "content": "Be brief."}, USER], "answer": ["42", "42.0"], "data_source": "d"},
        {"prompt": "Why?", "answer": None, "traces": None},
    )
    assert (text.messages, text.answer, text.traces, text.data_source) == ((USER,), "42", ("a", "b"), "mine")
    assert (turns.messages[-1], len(turns.messages), turns.answer, turns.data_source) == (USER, 2, ("42", "42.0"), "d")
    assert (bare.answer, bare.traces) == ("", ())


def test_a_trace_may_say_who_wrote_it(tmp_path):
    """The teachers stay those of the traces that stay."""
    mine = {"prompt": "Why?", "answer": "42", "traces": ["", "a", "b", "a"], "teachers": ["w", "x", "y", "z"]}
    target = {"target": [ASSISTANT], "target_lst": ["b", ASSISTANT["content"]], "target_teachers": ["x", "y", "z"]}
    theirs = {"prompt": [USER], "reward_model": {"ground_truth": "42"}} | target
    probs = {"target_ds_qwen_7b_probs": [0.5, 0.25, -1, -1]}
    [plain] = load(tmp_path, mine)
    scored, published = load(tmp_path, theirs | {"target_logps": [[-1.0, -2], [], [-3.0]]}, theirs | probs)
    assert (plain.traces, plain.teachers) == (("a", "b"), ("x", "y"))
    assert (scored.traces, scored.teachers) == ((ASSISTANT["content"], "b"), ("x", "y"))
    assert scored.trace_logps == ((-1.0, -2.0), ())
    assert published.trace_logps == ((math.log(0.5), math.log(0.25)), ())  # of the target alone, less its padding


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_teachers": ["x"]}, "column 'target_teachers' must have an entry for each trace, 2 in all, got 1"),
        ({"target_logps": [[], [], []]}, "column 'target_logps' must have an entry for each trace, 2 in all, got 3"),
        ({"target_logps": [[0.5], []]}, "column 'target_logps' must hold log-probs, numbers of at most 0"),
        ({"target_ds_qwen_7b_probs": [0.5, 0.0]}, "column 'target_ds_qwen_7b_probs' must hold probabilities above 0"),
    ],
)
def test_what_is_said_of_traces_must_be_said_of_each(tmp_path, changes, message):
    row = {"prompt": [USER], "reward_model": {"ground_truth": "42"}, "target": [ASSISTANT], "target_lst": ["b"]}
    with pytest.raises(DataError, match=message):
        load(tmp_path, row | changes)
    with pytest.raises(DataError, match=r"'teachers' must have an entry for each trace, 2 in all, got 1"):
        load(tmp_path, {"prompt": "Why?", "answer": "42", "traces": ["a", "b"], "teachers": ["x"]})


def test_chats_end_in_their_trace(tmp_path):
    several = [USER, {"role": "assistant", "content": "Sure?"}, {"role": "user", "content": "Yes."}, ASSISTANT]
    one, long, asked, given = load(
        tmp_path,
        {"messages": [USER, ASSISTANT]},
        {"messages": several},
        {"messages": [USER]},
        {"messages": [USER, {"role": "assistant", "content": "It is 42."}], "answer": "42"},
    )
    assert (one.messages, one.answer, one.traces) == ((USER,), "\\frac{84}{2}", (ASSISTANT["content"],))
    assert (long.messages, long.traces) == (tuple(several[:3]), one.traces)
    assert (asked.messages, asked.answer, asked.traces) == ((USER,), "", ())
    assert given.answer == "42"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (OPENR1 | {"generations": "one"}, "line 1: column 'generations' must be a list of strings"),
        (OPENR1 | {"correctness_math_verify": [True]}, "'correctness_math_verify' must mark each of 4 .*got 1 marks"),
        (OPENR1 | {"is_reasoning_complete": True}, "'is_reasoning_complete' must be a list of booleans, got bool"),
        (OPENR1 | {"problem": " "}, "line 1: column 'problem' must not be empty"),
        ({"problem": None, "solution": "x"}, "line 1: column 'problem' must be a string, got NoneType"),
        ({"problem": "x", "solution": 3}, "line 1: column 'solution' must be a string, got int 3"),
        ({"prompt": "x", "answer": 42}, "line 1: column 'answer' must be a string, or a list of .*got int 42"),
        ({"prompt": "x", "answer": []}, "line 1: column 'answer' must be"),
        ({"prompt": 3, "answer": "1"}, "line 1: column 'prompt' must be"),
        ({"prompt": "x", "answer": "1", "traces": "y"}, "line 1: column 'traces' must be a list of strings, got str"),
        ({"messages": [ASSISTANT]}, "line 1: column 'messages' must hold a user turn before"),
        ({"messages": [{"role": "user", "content": None}]}, "line 1: column 'messages' must be a list of {content"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_named(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        load(tmp_path, row)
