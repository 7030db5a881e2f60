"""Generated problems: right answers, honest splits, exact noise, files written once."""

import json
import random

import pytest

from luffy.problems import FAMILIES, SPLITS, TEACHERS, ProblemSpec, make_row, rows, write_splits
from luffy.problems.__main__ import main
from luffy.problems.family import Pen, solve_wrong
from luffy.problems.spec import question_split
from luffy.problems.write import MANIFEST
from luffy.rewards.graders import grade_answer, grade_train
from luffy.rewards.latex import last_boxed


def questions(spec: ProblemSpec, split: str) -> list[str]:
    return [row["prompt"][-1]["content"] for row in rows(spec, split)]


def independent_answer(family: str, question: str) -> str:
    """The answer worked out from the question's text alone, by other means than the family's own procedure."""
    import math
    import re

    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if family == "digit_sum":
        return str(sum(map(int, str(numbers[0]))))
    if family == "count_digit":
        return str(str(numbers[1]).count(str(numbers[0])))
    if family == "binary_to_decimal":
        return str(int(str(numbers[0]), 2))
    if family == "decimal_to_binary":
        return f"{numbers[0]:b}"
    if family == "remainder":
        return str(numbers[0] % numbers[1])
    if family == "product":
        return str(numbers[0] * numbers[1])
    if family == "gcd":
        return str(math.gcd(*numbers))
    if family == "arithmetic_sequence":
        return str(range(numbers[1], 10**6, numbers[2] - numbers[1])[numbers[0] - 1])
    if family == "unit_conversion":
        sizes = {"hours minutes": 60, "minutes seconds": 60, "days hours": 24, "weeks days": 7, "feet inches": 12}
        big, small = re.findall(r"\d+ (\w+)", question)
        return str(numbers[0] * {**sizes, "pounds ounces": 16}[f"{big} {small}"] + numbers[1])
    expression = re.search(r"(?:What is|Solve) (.*?)(?:\?| at x=| for x)", question)
    assert expression is not None, question
    text = re.sub(r"(\d)x", r"\1*x", expression.group(1)).replace("^", "**")
    if family == "linear_equation":
        left, right = text.split("=")
        return str(next(x for x in range(100) if eval(left, {"x": x}) == int(right)))
    return str(eval(text, {"x": numbers[-1]}))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_right_and_its_traces_verify(name):
    spec = ProblemSpec(families=[name], train=40, heldout=10, ood=20, suffix="", teachers=tuple(TEACHERS))
    for split in SPLITS:
        for row in rows(spec, split):
            question, truth = row["prompt"][-1]["content"], row["reward_model"]["ground_truth"]
            trace = row["target"][0]["content"]
            assert truth == independent_answer(name, question), question
            assert last_boxed(trace) == truth
            assert grade_answer(trace, truth) == 1.0, trace


@pytest.mark.parametrize("name", FAMILIES)
def test_splits_are_disjoint_and_ood_is_harder(name):
    spec = ProblemSpec(families=[name], train=300, heldout=100, ood=100)
    texts = {split: set(questions(spec, split)) for split in SPLITS}
    assert not texts["train"] & texts["heldout"]
    assert not (texts["train"] | texts["heldout"]) & texts["ood"]
    hardest = max(row["extra_info"]["difficulty"] for split in ("train", "heldout") for row in rows(spec, split))
    assert min(row["extra_info"]["difficulty"] for row in rows(spec, "ood")) > hardest
    # Another seed's training set still never meets this seed's held-out set.
    other = ProblemSpec(families=[name], train=300, heldout=0, ood=0, seed=1)
    assert not set(questions(other, "train")) & texts["heldout"]


def test_order_of_terms_does_not_cross_the_split():
    family = FAMILIES["addition_chain"]
    for a in range(10, 60):
        assert question_split(family, (a, 71, 15)) == question_split(family, (15, a, 71))


def test_problems_are_a_stable_function_of_seed_split_and_index():
    spec = ProblemSpec(families=["digit_sum", "gcd"], train=20, heldout=5, ood=5, seed=3)
    again = ProblemSpec(families=("digit_sum", "gcd"), train=7, heldout=0, ood=0, seed=3)
    assert [make_row(spec, "train", i) for i in range(7)] == list(rows(again, "train"))
    # Pinned: a change of these means another GENERATOR_VERSION.
    first = make_row(ProblemSpec(families=["digit_sum"], train=1), "train", 0)
    assert first["prompt"][0]["content"] == "What is the sum of the digits of 629499? Put the answer in \\boxed{}."
    assert first["target"][0]["content"].startswith("6+2=8, 8+9=17, 17+4=21, 21+9=30, 30+9=39.")


def test_noise_has_its_fractions_and_leaves_questions_alone():
    n = 3000
    clean = ProblemSpec(families=["digit_sum"], train=n, heldout=20, ood=0)
    teachers = ("terse", "lines", "numbered")
    noisy = ProblemSpec(
        families=["digit_sum"], train=n, heldout=20, ood=0, wrong=0.3, missing=0.2, verbose=0.1, teachers=teachers
    )
    assert questions(clean, "train") == questions(noisy, "train")
    made = list(rows(noisy, "train"))
    with_trace = [row for row in made if row["target"]]
    assert abs(len(with_trace) / n - 0.8) < 0.03
    ends_wrong = [last_boxed(row["target"][0]["content"]) != row["reward_model"]["ground_truth"] for row in with_trace]
    assert abs(sum(ends_wrong) / len(with_trace) - 0.3) < 0.03
    assert ends_wrong == [row["extra_info"]["wrong"] for row in with_trace]
    told_by = [row["extra_info"]["teacher"] for row in with_trace]
    assert abs(told_by.count("verbose") / len(told_by) - 0.1) < 0.03
    for teacher in teachers:
        assert abs(told_by.count(teacher) / len(told_by) - 0.3) < 0.04
    for row in rows(noisy, "heldout"):
        assert last_boxed(row["target"][0]["content"]) == row["reward_model"]["ground_truth"]


def test_several_traces_are_of_several_teachers_and_go_wrong_one_by_one():
    styles = ("terse", "lines", "numbered", "arrows")
    spec = ProblemSpec(families=["digit_sum"], train=400, teachers=styles, traces=3, wrong=0.3, missing=0.1)
    one = ProblemSpec(families=["digit_sum"], train=400, teachers=styles, wrong=0.3, missing=0.1)
    wrong = []
    for row, alone in zip(rows(spec, "train"), rows(one, "train"), strict=True):
        assert row["target"] == alone["target"], "the first trace is the only one's"
        told = [turn["content"] for turn in row["target"] or []] + row["target_lst"]
        assert len(told) == len(set(row["target_teachers"])) == (3 if row["target"] else 0)
        wrong.append([last_boxed(text) != row["reward_model"]["ground_truth"] for text in told])
    assert abs(sum(map(sum, wrong)) / sum(map(len, wrong)) - 0.3) < 0.05
    assert {sum(each) for each in wrong} >= {0, 1, 2}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_slip_carries_through_to_another_answer(name):
    family, rng = FAMILIES[name], random.Random(0)
    for _ in range(50):
        params = family.draw(rng, {knob: high for knob, (_, high) in family.knobs.items()})
        _, truth = family.solve(params, Pen())
        _, wrong = solve_wrong(family, params, rng)
        assert wrong != truth


def test_think_tags_satisfy_the_train_grader():
    row = make_row(ProblemSpec(families=["product"], train=1, think=True, system="Be brief."), "train", 0)
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]
    trace, truth = row["target"][0]["content"], row["reward_model"]["ground_truth"]
    assert trace.startswith("<think>\n")
    assert grade_train(trace, truth) == 1.0


def test_splits_are_written_once_and_redone_when_the_spec_or_a_file_changes(tmp_path):
    spec = ProblemSpec(families=["remainder"], train=30, heldout=5, ood=5, missing=0.5)
    paths = write_splits(spec, tmp_path)
    assert sorted(paths) == ["heldout", "ood", "train"]
    stamps = {path: path.stat().st_mtime_ns for path in paths.values()}
    assert write_splits(spec, tmp_path) == paths
    assert {path: path.stat().st_mtime_ns for path in paths.values()} == stamps
    paths["train"].write_bytes(b"damaged")
    write_splits(spec, tmp_path)
    assert paths["train"].read_bytes()[:4] == b"PAR1"
    assert list(write_splits(ProblemSpec(families=["gcd"], train=3, heldout=0, ood=0), tmp_path)) == ["train"]
    assert not paths["ood"].exists(), "a stale split would be read as part of the new data"
    assert json.loads((tmp_path / MANIFEST).read_text())["spec"]["families"] == {
        "gcd": {"divisions": [2, 3], "ood": [4, 5]}
    }
    assert not list(tmp_path.glob("*.tmp"))


def test_parquet_has_the_training_schema(tmp_path):
    import pyarrow.parquet as pq

    spec = ProblemSpec(families=["gcd"], train=10, heldout=0, ood=0, missing=0.5)
    table = pq.read_table(write_splits(spec, tmp_path)["train"])
    luffys = ["data_source", "prompt", "target", "ability", "reward_model", "extra_info"]
    assert [name for name in table.column_names if name not in ("target_lst", "target_teachers")] == luffys
    assert table.to_pylist() == list(rows(spec, "train"))
    assert 0 < table.column("target").null_count < 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"families": ["digits_sum"]}, "families must be among"),
        ({"families": []}, "at least one family"),
        ({"families": {"gcd": {"size": (1, 2)}}}, "has the knobs divisions, ood_divisions"),
        ({"families": {"digit_sum": {"digits": (4, 9)}}}, "must lie above the training range"),
        ({"families": {"digit_sum": {"digits": (5, 4)}}}, "low <= high"),
        ({"wrong": 1.5}, "wrong must be a fraction"),
        ({"teachers": ["socrates"]}, "teachers must be among"),
        ({"train": -1}, "train must be a count"),
        ({"teachers": ["terse", "terse"], "traces": 2}, "traces must be 1 to the number of teachers, got 2 of 1"),
    ],
)
def test_bad_specs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProblemSpec(**arguments)


def test_knobs_override_a_range():
    spec = ProblemSpec(families={"digit_sum": {"digits": [2, 3], "ood_digits": 12}}, train=20, ood=5)
    assert {row["extra_info"]["difficulty"] for row in rows(spec, "train")} == {2, 3}
    assert {row["extra_info"]["difficulty"] for row in rows(spec, "ood")} == {12}


def test_an_exhausted_range_is_an_error_not_a_hang():
    spec = ProblemSpec(families={"binary_to_decimal": {"bits": (1, 1)}}, train=1, heldout=1, ood=0)
    with pytest.raises(ValueError, match="widen a range"):
        list(rows(spec, "train")) + list(rows(spec, "heldout"))


def test_the_command_prints_samples(capsys):
    assert main(["--family", "digit_sum", "--n", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\\boxed{}") == 2
    assert "629499" in printed
