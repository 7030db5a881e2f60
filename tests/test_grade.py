"""`luffy grade`: answers of a file, by one grader or two."""

import json

import pytest
from test_cli import refused
from tiny import luffy, write_jsonl

ROWS = [
    {"id": "a", "response": "so \\boxed{1/2}", "answer": "0.5", "more": [1]},
    {"id": "b", "response": "x is 2.", "answer": 2},
    {"id": "c", "response": "\\boxed{3}", "answer": ["4", "3"]},
    {"id": "d", "response": "", "answer": "5"},
    {"response": "\\boxed{7} \ud800", "answer": 7.0},
    {"response": "\\boxed{9^{9^{9^{9}}}}", "answer": "8"},
]


def test_lines_keep_their_order_and_get_a_reward(tmp_path):
    file, out = write_jsonl(tmp_path / "answers.jsonl", ROWS), tmp_path / "graded.jsonl"
    done = luffy(
        "grade", file, "--grader", "boxed", "--compare", "answer", "--out", out, "--timeout", "3", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k not in ("reward", "verdict")} for row in found] == ROWS
    assert [row["reward"] for row in found] == [1, 0, 1, 0, 1, 0]
    assert [row["verdict"] for row in found[:5]] == ["ok"] * 5
    assert "line 2, id b: boxed 0, answer 1   answer '2'   given 'x is 2.'" in done.stdout
    assert "both right 3, both wrong 2, right by the first alone 0, by the second alone 1" in done.stdout
    assert "boxed-4: 3 of 6 right (50.0%), mean reward 0.5000" in done.stdout


def test_a_timeout_is_said_and_written(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\ndef grade(response, answer):\n    time.sleep(9 * (answer == 'x'))\n    return 1\n"
    )
    file, out = (
        write_jsonl(tmp_path / "a.jsonl", [{"response": "", "answer": one} for one in "yxy"]),
        tmp_path / "b.jsonl",
    )
    done = luffy("grade", file, "--grader", "slow:grade", "--out", out, "--timeout", "1", cwd=tmp_path)
    assert "slow:grade: 2 of 3 right (66.7%), mean reward 0.6667, timeouts 1, crashes 0" in done.stdout
    assert [json.loads(line)["verdict"] for line in out.read_text().splitlines()] == ["ok", "timeout", "ok"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"response": "x"}', ("answers.jsonl, line 2", "no field `answer`", "response")),
        ('{"answer": "x"}', ("answers.jsonl, line 2", "no field `response`")),
        ('{"response": 3, "answer": "x"}', ("`response` must be a text, got int",)),
        ('{"response": "3", "answer": {"a": 1}}', ("`answer` must be a text or a number",)),
        ('{"response": "3", "answer": []}', ("`answer` must be",)),
        ('{"response": "3", "answer": " "}', ("`answer` must be",)),
        ('{"response": "3", "answer": true}', ("`answer` must be",)),
        ('{"id": "a", "response": "3", "answer": "3"}', ("id 'a' is also that of line 1",)),
        ("[1]", ("answers.jsonl, line 2: must be a JSON object, got list",)),
        ("\udcff", ("grade: ", "answers.jsonl, line 2: must be text in UTF-8, got byte 0xff at column 1")),
        ("{", ("answers.jsonl, line 2", "not valid JSON", "at column 2", "mend the line")),
    ],
)
def test_a_line_that_cannot_be_graded(tmp_path, line, words):
    file = write_jsonl(tmp_path / "answers.jsonl", ROWS[:1])
    with file.open("a", errors="surrogateescape") as more:
        more.write(line + "\n")
    done = luffy("grade", file, "--grader", "exact", "--out", tmp_path / "out.jsonl", cwd=tmp_path)
    assert refused(done, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl"]


def test_what_is_missing(tmp_path):
    gone = luffy("grade", "no.jsonl", "--grader", "exact", cwd=tmp_path)
    assert gone.stderr == "luffy: grade: there is no file no.jsonl; mend the path\n"
    assert refused(luffy("grade", ".", "--grader", "exact", cwd=tmp_path), "grade: . is a folder, and a file is read")
    (tmp_path / "empty.jsonl").touch()
    assert refused(luffy("grade", tmp_path / "empty.jsonl", "--grader", "exact", cwd=tmp_path), "has no lines")
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert refused(luffy("grade", file, "--grader", "boxd", cwd=tmp_path), "boxd", "among train, answer, boxed")
    assert refused(luffy("grade", file, "--grader", "exact", "--out", "/no/where", cwd=tmp_path), "/no")
