"""reasoning-gym: problems of its tasks, graded by its own verifiers, by the real package."""

import json
import sys

import pytest

from luffy.cli import main
from luffy.data import load_problems
from luffy.errors import UserError
from luffy.problems.gym import make_rows
from luffy.rewards import VerifierPool, grade_gym
from luffy.rewards.graders import find_grader


@pytest.fixture
def reasoning_gym():
    return pytest.importorskip("reasoning_gym", reason="needs the `gym` extra")


def test_problems_are_written_read_and_graded(reasoning_gym, tmp_path, capsys):
    file = tmp_path / "chains.jsonl"
    asked = ["data", "gym", "chain_sum", "--count", "20", "--seed", "3", "--out", str(file), "--set", "max_terms=3"]
    assert main(asked) == 0
    assert "20 problems of chain_sum" in capsys.readouterr().out
    problems = list(load_problems(file))
    entries = list(reasoning_gym.create_dataset("chain_sum", size=20, seed=3, max_terms=3))
    assert all(p.messages[-1]["content"].startswith(e["question"]) for p, e in zip(problems, entries, strict=True))
    assert {p.data_source for p in problems} == {"gym/chain_sum"}
    right = [(f"I think <answer>{e['answer']}</answer>", p.answer) for p, e in zip(problems, entries, strict=True)]
    wrong = [(f"<answer>{e['answer']}</answer> no, <answer>1{e['answer']}</answer>", answer)
             for e, (_, answer) in zip(entries, right, strict=True)]  # fmt: skip
    boxed = [(f"\\boxed{{{e['answer']}}}", answer) for e, (_, answer) in zip(entries, right, strict=True)]
    with VerifierPool("gym", workers=1, timeout_s=20) as pool:
        assert {v.reward for v in pool.grade(right)} == {v.reward for v in pool.grade(boxed)} == {1.0}
        verdicts = pool.grade(wrong)
    assert all(v.reward < 1 and v.status == "ok" for v in verdicts)
    seeds = [[p["prompt"] for p in make_rows("chain_sum", 5, seed, {})] for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize("task", ["sudoku", "countdown", "letter_counting", "spell_backward"])
def test_each_tasks_own_verifier_judges(reasoning_gym, task):
    [row] = make_rows(task, 1, 5, {})
    [entry] = reasoning_gym.create_dataset(task, size=1, seed=5)
    best = grade_gym(f"<answer>\n{entry['answer']}\n</answer>", row["answer"])
    assert best == reasoning_gym.get_score_answer_fn(task)(answer=entry["answer"], entry=entry) == 1.0
    assert grade_gym("<answer>no idea</answer>", row["answer"]) < 1.0


def test_another_version_of_the_package_is_noticed(reasoning_gym):
    [row] = make_rows("chain_sum", 1, 0, {})
    place = json.loads(row["answer"]) | {"question": "0" * 16}
    with pytest.raises(ValueError, match="another version of reasoning-gym; make them again"):
        grade_gym("<answer>1</answer>", json.dumps(place))


@pytest.mark.parametrize(
    ("task", "config", "words"),
    [
        ("chain_sums", {}, "no task 'chain_sums'; it has .*chain_sum"),
        ("chain_sum", {"terms": 3}, "chain_sum does not take {'terms': 3}: .*unexpected keyword argument 'terms'"),
        ("chain_sum", {"min_terms": 9, "max_terms": 3}, "max_terms must be >= min_terms"),
    ],
)
def test_what_it_does_not_know_is_one_sentence(reasoning_gym, task, config, words):
    with pytest.raises(UserError, match=words):
        make_rows(task, 3, 0, config)


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setattr("luffy.problems.gym.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="reasoning-gym is not installed; install the `gym` extra"):
        find_grader("gym")
    assert main(["data", "gym", "chain_sum", "--out", str(tmp_path / "x.jsonl")]) == 2
    assert "reasoning-gym is not installed; install the `gym` extra" in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()
