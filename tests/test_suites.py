"""Benchmarks by name: rows in the columns of their data sets, from files in place of the hub."""

import json

import pytest
from test_cli import refused
from tiny import luffy, make_model

from luffy.errors import UserError
from luffy.evaluation.benchmarks import BENCHMARKS, SUITES, benchmarks_in
from luffy.evaluation.suites import problems_of
from luffy.rewards import grade_boxed, grade_choice

ROWS = {
    "aime24": {"id": 60, "problem": "Find it.", "solution": "...", "answer": "204", "year": "2024"},
    "aime25": {"problem": "Find it.", "answer": "70", "id": "0"},
    "amc": {"id": 0, "problem": "Find it.", "answer": 142.0, "url": "..."},
    "math500": {"problem": "Find it.", "solution": "\\boxed{1}", "answer": "\\frac{1}{2}", "subject": "x", "level": 1},
    "minerva": {"question": "Find it.", "answer": "3.61e2"},
    "olympiad": {"id": 1, "question": "Find it.", "solution": ["..."], "final_answer": ["$2$", "$3$"], "unit": None},
    "arc_c": {
        "id": "x",
        "question": "Which?",
        "choices": {"text": ["red", "green", "blue"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    "gpqa": {
        "Question": "Which?",
        "Correct Answer": "green",
        "Incorrect Answer 1": "red",
        "Incorrect Answer 2": "blue",
        "Incorrect Answer 3": "grey",
    },
    "mmlu_pro": {"question": "Which?", "options": list("abcdefghij"), "answer": "J", "answer_index": 9},
}
ANSWERS = {"aime24": "204", "aime25": "70", "amc": "142", "math500": "\\frac{1}{2}", "minerva": "3.61e2"}
ANSWERS |= {"olympiad": ("$2$", "$3$"), "arc_c": "B", "mmlu_pro": "J"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("LUFFY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "benchmarks").mkdir(parents=True)

    def place(name: str, *rows: dict) -> None:
        path = tmp_path / "cache" / "benchmarks" / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return place


def test_every_suite_is_of_benchmarks():
    names = [benchmark.name for benchmark in BENCHMARKS]
    assert set(SUITES["math"]) | set(SUITES["ood"]) == set(names) == set(ROWS)
    assert benchmarks_in(["ood", "gpqa", "aime24"]) == ["arc_c", "gpqa", "mmlu_pro", "aime24"]


@pytest.mark.parametrize("name", ANSWERS)
def test_rows_of_a_benchmark(place, name):
    place(name, ROWS[name], ROWS[name] | {"question": "Another?", "problem": "Another."})
    one, two = problems_of(name)
    assert one.answer == ANSWERS[name]
    assert (one.id, two.id, one.data_source) == (f"{name}/0", f"{name}/1", name)
    assert one.messages[0]["content"].startswith(("Find it.", "Which?"))
    assert len(problems_of(name, limit=1)) == 1
    if name in SUITES["math"]:
        assert (
            grade_boxed(f"\\boxed{{{one.answer if isinstance(one.answer, str) else one.answer[1]}}}", one.answer) == 1
        )


def test_options_are_shuffled_by_a_seed(place):
    rows = [ROWS["mmlu_pro"] | {"question": f"Which {n}?"} for n in range(60)]
    place("mmlu_pro", *rows)
    as_they_are = problems_of("mmlu_pro")
    assert {problem.answer for problem in as_they_are} == {"J"}
    shuffled = problems_of("mmlu_pro", seed=1)
    assert shuffled == problems_of("mmlu_pro", seed=1)
    assert shuffled != problems_of("mmlu_pro", seed=2)
    assert len({problem.answer for problem in shuffled}) == 10
    for problem in shuffled:  # whatever the letter, it is that option's
        lines = problem.messages[0]["content"].splitlines()
        assert f"{problem.answer}) j" in lines
        assert sorted(line[3:] for line in lines if line[1:3] == ") ") == list("abcdefghij")
        assert grade_choice(f"so \\boxed{{{problem.answer}}}", problem.answer) == 1


def test_gpqas_first_option_is_not_always_right(place):
    """As its file has it."""
    place("gpqa", *(ROWS["gpqa"] | {"Question": f"Which {n}?"} for n in range(40)))
    problems = problems_of("gpqa")
    assert {problem.answer for problem in problems} == set("ABCD")
    assert all(f"{p.answer}) green" in p.messages[0]["content"] for p in problems)


def test_rows_in_a_schema_of_ours_will_do(place):
    place("minerva", {"prompt": "Find it.", "answer": "7"})
    [problem] = problems_of("minerva")
    assert problem.answer == "7"


def test_a_row_that_is_not_the_benchmarks(place):
    place("mmlu_pro", ROWS["mmlu_pro"], ROWS["mmlu_pro"] | {"answer_index": 12})
    with pytest.raises(UserError, match=r"mmlu_pro.jsonl.*not a row of MMLU-Pro"):
        problems_of("mmlu_pro")
    place("arc_c", ROWS["arc_c"] | {"answerKey": "Z"})
    with pytest.raises(UserError, match="not a row of ARC-c"):
        problems_of("arc_c")
    place("aime25", ROWS["aime25"] | {"answer": " "})
    with pytest.raises(UserError, match=r"AIME 2025's row has no answer"):
        problems_of("aime25")


def test_what_cannot_be_downloaded_is_to_be_placed(place, tmp_path):
    model = make_model(tmp_path / "model")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "LUFFY_CACHE": str(tmp_path / "cache")}
    done = luffy("eval", "--suite", "math", "--model", model, "--out", tmp_path / "out", cwd=tmp_path, **offline)
    assert refused(done, "AIME 2024 cannot be downloaded", str(tmp_path / "cache/benchmarks/aime24.parquet"), "answer")
    assert refused(luffy("eval", "--suite", "mth", "--model", model, cwd=tmp_path), "mth", "math", "aime24")
    assert refused(luffy("eval", "--model", model, cwd=tmp_path), "--data or --suite", "quick")


@pytest.mark.slow
def test_a_benchmark_and_a_file_through_vllm(place, tmp_path):
    place("amc", ROWS["amc"])
    place("gpqa", ROWS["gpqa"])
    model = make_model(tmp_path / "model")
    options = ["--suite", "amc", "gpqa", "quick", "--limit", "2", "--max-tokens", "3", "--out", tmp_path / "out"]
    done = luffy("eval", *options, "--model", model, cwd=tmp_path, LUFFY_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    [model] = json.loads((tmp_path / "out" / "summary.json").read_text())["models"].values()
    found = {one["benchmark"]: (one["questions"], one["answers"], one["grader"]) for one in model["benchmarks"]}
    assert found.pop("amc") == (1, 32, "boxed-4")
    assert found.pop("gpqa") == (1, 1, "choice-1")
    [(questions, answers, _)] = found.values()
    assert (questions, answers) == (2, 2)
