"""`luffy data prepare` on sources whose every row is known: what stays, what goes, and the same after a kill."""

import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from tiny import luffy, make_tokenizer

from luffy.data import DataError, load_problems, tokenize
from luffy.data.think import think_fault
from luffy.errors import UserError
from luffy.prepare.options import OPENR1, Options
from luffy.prepare.parts import prepare
from luffy.prompts import LUFFY_SYSTEM, PromptTemplate

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LIMIT = 60
"""Tokens, which are bytes here."""


def good(thought: str, answer: str = "4") -> str:
    return f"<think>\n{thought}</think>\n\\boxed{{{answer}}}"


def row(question: str, *generations: tuple[str, bool | None, bool], answer: str | None = "4") -> dict:
    texts, right, complete = (list(column) for column in zip(*generations, strict=True)) if generations else ([],) * 3
    return {
        "problem": question,
        "solution": "elsewhere",
        "answer": answer,
        "source": "olympiads",
        "uuid": f"u{question}",
        "generations": texts,
        "correctness_math_verify": right,
        "is_reasoning_complete": complete,
    }


EXACT = good("x" * (LIMIT - len(good(""))))
ROWS = [
    row("a", ("", True, True), (good("wrong"), False, True), (good("cut"), True, False), (good("one"), True, True),
        (good("one"), True, True), (good("two"), True, True)),
    row("b", (EXACT + "x", True, True), (EXACT, True, True)),
    row("c", ("<think>\nno end, 4", True, True), ("<think>\n" + good("x"), True, True),
        (good("y") + "</think>", True, True)),
    row("d", (good("x"), None, True)),
    row("e"),
    row("f", (good("x"), True, True), answer=""),
    row(" a\n", (good("three"), True, True), (good("four"), False, True)),
    row("g", (good("late"), True, True)),
]  # fmt: skip
PROBLEMS = {"read": 8, "without_answer": 1, "in_complement": 0, "prompt_too_long": 0, "without_trace": 3,
            "repeated_question": 1, "kept": 3}  # fmt: skip
GENERATIONS = {"read": 15, "empty": 1, "marked_wrong": 3, "incomplete": 1, "think_unclosed": 1, "think_repeated": 2,
               "repeated": 1, "too_long": 1, "rejected": 0, "not_wanted": 1, "of_repeated_question": 1,
               "kept": 3}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def options(tmp_path, tokenizer):
    def make(rows: list[dict] = ROWS, name: str = "source", **changes) -> Options:
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps(one) + "\n" for one in rows))
        return Options(**{"source": str(source), "tokenizer": tokenizer, "max_tokens": LIMIT} | changes)

    return make


def rows_of(folder: Path, name: str = "train") -> list[dict]:
    import pyarrow.parquet as pq

    return pq.read_table(folder / f"{name}.parquet").to_pylist()


@pytest.mark.parametrize("part_rows", [1, 3, 100])
def test_every_generation_is_kept_or_counted(options, tmp_path, part_rows):
    report = prepare(options(part_rows=part_rows), tmp_path / "out")
    assert report["problems"] == PROBLEMS
    assert report["generations"] == GENERATIONS
    for counts in (report["problems"], report["generations"]):
        assert counts["read"] == sum(count for step, count in counts.items() if step != "read")
    assert report["examples"]["too_long"] == ["source/ub"]
    assert report["examples"]["without_trace"] == ["source/uc", "source/ud", "source/ue"]
    assert rows_of(tmp_path / "out")[0] == {
        "data_source": "openr1",
        "prompt": [{"content": LUFFY_SYSTEM, "role": "system"}, {"content": "a", "role": "user"}],
        "target": [{"content": good("one"), "role": "assistant"}],
        "ability": "math",
        "reward_model": {"ground_truth": "4", "style": "rule"},
        "extra_info": {"index": 0, "split": "default", "id": "source/ua", "source": "olympiads"},
        "target_teachers": ["DeepSeek-R1"],
    }
    assert [one["target"][0]["content"] for one in rows_of(tmp_path / "out")] == [good("one"), EXACT, good("late")]
    assert [one["extra_info"]["index"] for one in rows_of(tmp_path / "out")] == [0, 1, 7]
    loaded = load_problems(tmp_path / "out")
    assert [one.id for one in loaded] == ["openr1/default/0", "openr1/default/1", "openr1/default/7"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "train.parquet"]


def test_more_traces_where_they_are_wanted(options, tmp_path):
    report = prepare(options(traces=3), tmp_path / "out")
    assert (report["generations"]["not_wanted"], report["generations"]["kept"]) == (0, 4)
    first = rows_of(tmp_path / "out")[0]
    assert first["target_lst"] == [good("two")]
    assert first["target_teachers"] == ["DeepSeek-R1"] * 2
    assert load_problems(tmp_path / "out")[0].traces == (good("one"), good("two"))


def test_the_complement_has_the_questions_that_are_left(options, tmp_path):
    prepare(options(), tmp_path / "out")
    report = prepare(options(complement=str(tmp_path / "out"), traces=0), tmp_path / "rest")
    assert (report["problems"]["in_complement"], report["problems"]["kept"]) == (4, 3)  # " a" is "a"
    assert report["generations"]["read"] == 0
    assert "target" not in rows_of(tmp_path / "rest")[0]
    assert [one.messages[-1]["content"] for one in load_problems(tmp_path / "rest")] == ["c", "d", "e"]


def test_the_verifier_in_place_of_the_marks(options, tmp_path):
    rows = [
        row("a", (good("x", "5"), True, True), (good("y", "4"), False, True)),
        row("b", (good("z", "3"), True, True)),
    ]
    unmarked = [{key: value for key, value in one.items() if key != "correctness_math_verify"} for one in rows]
    report = prepare(options(unmarked, verify="train"), tmp_path / "out")
    assert (report["generations"]["rejected"], report["generations"]["marked_wrong"]) == (2, 0)
    assert [one.traces for one in load_problems(tmp_path / "out")] == [(good("y", "4"),)]
    with pytest.raises(DataError, match=r"line 1: column 'correctness_math_verify' is missing.*--verify"):
        prepare(options(unmarked), tmp_path / "other")


def test_prompts_are_measured_as_they_are_written(options, tmp_path):
    rows = [row("a" * 10, (good("x"), True, True)), row("a" * 11, (good("x"), True, True))]
    report = prepare(options(rows, system=False, max_prompt_tokens=10), tmp_path / "out")
    assert report["problems"]["prompt_too_long"] == 1
    assert rows_of(tmp_path / "out")[0]["prompt"] == [{"content": "a" * 10, "role": "user"}]
    with pytest.raises(DataError, match="no problem is left: of 2 problems and 0 generations 2 whose prompt is"):
        prepare(options(rows, max_prompt_tokens=10), tmp_path / "other")


def test_other_schemas_and_several_answers(options, tmp_path):
    rows = [
        {"prompt": "1+1?", "answer": ["2", "two"], "traces": ["it is 2", "\\boxed{2}"]},
        {"prompt": "?", "answer": ""},
    ]
    one = {"prompt": "2+2?", "answer": "4", "traces": ["\\boxed{4}"]}
    report = prepare(options([*rows, one], traces=2, part_rows=2), tmp_path / "out")
    assert (report["several_answers"], report["problems"]["without_answer"]) == (1, 1)
    several, single = load_problems(tmp_path / "out")
    assert (several.answer, several.traces) == (("2", "two"), ("it is 2", "\\boxed{2}"))
    assert single.answer == ("4",)
    assert rows_of(tmp_path / "out")[0]["target_teachers"] is None


SLOW = """
import sys
sys.path.insert(0, {folder!r})
from luffy.prepare.options import Options
from luffy.prepare.parts import prepare
prepare(Options(**{options!r}), {out!r})
"""


def test_a_killed_call_goes_on_to_the_same_bytes(options, tmp_path, monkeypatch):
    import dataclasses

    (tmp_path / "slow_grader.py").write_text(
        "import time\ndef grade(text, answer):\n    time.sleep(0.05)\n    return 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    rows = [row(f"{i % 31}", (good(f"{i}"), i % 5 > 0, i % 7 > 0), (good("same"), True, True)) for i in range(40)]
    given = options(rows, verify="slow_grader:grade", part_rows=4)
    code = SLOW.format(folder=str(tmp_path), options=dataclasses.asdict(given), out=str(tmp_path / "killed"))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "killed/.prepare/part-00001.json").exists() and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, "it must not have been done already"
    assert not (tmp_path / "killed/report.json").exists()
    with pytest.raises(UserError, match="a set was begun here with max_tokens 60, now 61; choose another folder"):
        prepare(dataclasses.replace(given, max_tokens=61), tmp_path / "killed")
    seen: list[int] = []
    prepare(given, tmp_path / "killed", lambda tally: seen.append(tally.problems["read"]))
    assert seen[0] > 8, "what was done is not done again"
    assert seen[-1] == 40
    prepare(given, tmp_path / "whole")
    for name in ("train.parquet", "report.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "killed").glob(".*"))


def test_a_finished_folder_is_left_alone(options, tmp_path):
    given = options()
    report = prepare(given, tmp_path / "out")
    written = (tmp_path / "out/train.parquet").stat().st_mtime_ns
    assert prepare(given, tmp_path / "out") == report
    assert (tmp_path / "out/train.parquet").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="a set was finished here with traces 1, now 2"):
        prepare(options(traces=2), tmp_path / "out")
    with pytest.raises(UserError, match="a set was finished here with sha256 "):
        prepare(options(ROWS[:-1]), tmp_path / "out")


def test_a_mistake_does_not_occupy_the_folder(options, tmp_path, tokenizer):
    with pytest.raises(DataError, match="no such file or folder"):
        prepare(Options(source=str(tmp_path / "nowhere.jsonl"), tokenizer=tokenizer), tmp_path / "out")
    with pytest.raises(UserError, match="tokenizer .*nowhere that counts tokens could not be loaded.*; name another"):
        prepare(options(tokenizer=str(tmp_path / "nowhere")), tmp_path / "out")
    assert prepare(options(), tmp_path / "out")["problems"] == PROBLEMS
    for change in ({"limit": 0}, {"max_tokens": 0}, {"traces": -1}):
        with pytest.raises(ValueError, match="prepare: .* must be at least"):
            options(**change)


def test_openr1_is_streamed_from_one_commit(options, tmp_path, monkeypatch):
    """What is asked of the datasets package; the network itself is not there in tests."""
    asked = []

    class Streamed(list):
        def skip(self, n):
            return Streamed(self[n:])

    def load_dataset(name, config, **given):
        asked.append((name, config, given))
        return Streamed(ROWS)

    class Api:
        def dataset_info(self, name, revision):
            assert (name, revision) == ("open-r1/OpenR1-Math-220k", None)
            return types.SimpleNamespace(sha="c0ffee")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.chdir(tmp_path)
    report = prepare(options(source="openr1", limit=7), tmp_path / "out")
    assert asked == [(*OPENR1.split(":"), {"split": "train", "streaming": True, "revision": "c0ffee"})]
    assert report["problems"]["read"] == 7
    assert report["options"]["revision"] == "c0ffee"


@pytest.mark.parametrize(
    ("text", "opened", "fault"),
    [
        ("no tags at all", False, ""),
        ("no tags at all", True, ""),
        (good("x"), False, ""),
        (good("x"), True, ""),
        ("x</think>4", True, ""),
        ("<think>x</think>4", True, "repeated"),  # without the newline the prompt's own stays
        ("<think>\n" + good("x"), False, "repeated"),
        (good("x") + "</think>", False, "repeated"),
        ("<think>\nx", False, "unclosed"),
        ("<think>\nx", True, "unclosed"),
    ],
)
def test_think_tags(text, opened, fault):
    assert think_fault(text, opened=opened) == fault


def test_the_command(options, tmp_path, tokenizer):
    source = options().source
    call = ("data", "prepare", source, "--out", "out", "--tokenizer", tokenizer, "--max-trace-tokens", LIMIT)
    done = luffy(*map(str, call), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert ["8", "problems read"] in lines
    assert ["-3", "left without a trace, such as source/uc, source/ud, source/ue"] in lines
    assert ["3", "generations kept"] in lines
    bad = luffy("data", "prepare", "openr1", "--out", "hub", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
    assert "offline or no such data set" in bad.stderr
    assert not (tmp_path / "hub").exists()


def test_gsm8k_from_end_to_end(tmp_path):
    if not (SHARED / "gsm8k_train.jsonl").exists():
        pytest.skip("gsm8k_train.jsonl is not there")
    from transformers import AutoTokenizer

    from luffy.embedded import resolve_model

    name = "embedded:smollm2-135m-instruct"
    report = prepare(Options(source=str(SHARED / "gsm8k_train.jsonl"), tokenizer=name, max_tokens=300), tmp_path)
    assert (report["problems"]["read"], report["problems"]["kept"]) == (7473, 7467)
    assert report["generations"]["too_long"] == report["problems"]["without_trace"] == 6
    problems = load_problems(tmp_path)
    source = load_problems(SHARED / "gsm8k_train.jsonl")
    for one in problems[::97]:
        origin = source[one.extra["index"]]
        assert (one.messages[-1], one.answer, one.traces) == (origin.messages[-1], origin.answer, origin.traces)
    template = PromptTemplate(AutoTokenizer.from_pretrained(resolve_model(name)))
    examples, counts = tokenize(problems, template, max_prompt_tokens=1024, max_trace_tokens=301)
    assert (len(examples), counts.traces, counts.on_policy_only) == (7467, 7467, 0)
