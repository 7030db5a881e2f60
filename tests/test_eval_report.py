"""The page of an evaluation: what it says, that nothing of an answer becomes part of it, and in a browser."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_eval import ANSWERS, QUESTIONS, boxes
from tiny import luffy, make_model

from luffy.evaluation.answers import Answered
from luffy.evaluation.html import (
    CHARACTERS,
    Evaluated,
    latex,
    markdown,
    shortened,
    theirs,
    titles,
    write_report,
)
from luffy.evaluation.mathml import answer, formula, typeset
from luffy.evaluation.published import BENCHMARKS, beside, published
from luffy.evaluation.questions import Question
from luffy.evaluation.scores import grade, scores
from luffy.rewards import VerifierPool

ROOT = Path(__file__).resolve().parents[1]
CSV = ROOT.parent / "shared" / "data" / "luffy_reference_results.csv"

HOSTILE = (
    "<script>document.title = 'run'</script><img src=x onerror=\"document.title='run'\"> $\\text{<b>x</b>}$ \\boxed{2}"
)


def evaluated(model: str = "mine", answers=ANSWERS) -> Evaluated:
    questions = [
        Question("aime24/0", "What is $\\frac{4}{2}$?", (1,), "2", 4),
        Question("aime24/1", "Solve \\[ x^2 = 9 \\] for $x > 0$.", (2,), "\\frac{6}{2}", 4),
        Question("aime24/2", HOSTILE, (3,), "<i>4</i>", 4),
    ]
    with VerifierPool("boxed") as boxed, VerifierPool("exact") as exact:
        found = grade(questions, answers, [boxed, exact], opened=False)
        more = grade(QUESTIONS, answers, [boxed, exact], opened=False)
    every = [scores("aime24", found, "boxed", [1, 2]), scores("own", more, "boxed", [1, 2])]
    return Evaluated(model, every, {"aime24": found, "own": more})


@pytest.fixture(scope="module")
def models() -> list[Evaluated]:
    worse = [boxes("7", "7", "7", "7"), [Answered(HOSTILE, 3, True)] * 4, [Answered("x" * 20_000, 9, False)] * 4]
    return [evaluated(), evaluated("<b>other</b>", worse)]


@pytest.fixture(scope="module")
def page(models, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "out.html"
    write_report(path, models, {"n": 4, "temperature": 0.6}, ["3 of 3 problems of aime chose <the> checkpoint."])
    return path


class Tags(HTMLParser):
    """What a browser would see as elements and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]


def test_nothing_of_an_answer_becomes_part_of_the_page(page):
    found = Tags(page.read_text())
    assert found.tags.count("script") == 1  # ours
    assert not {"img", "b", "i", "iframe", "a", "link"} & (set(found.tags) - {"i"})
    assert not [name for name in found.attributes if name.startswith("on") or name in ("src", "href")]
    assert "&lt;script&gt;" in page.read_text()
    assert "http" not in re.sub(r"http://www.w3.org/1998/Math/MathML", "", page.read_text())  # no network


def test_formulas_are_drawn_from_harmless_elements():
    assert "<mfrac" in formula("\\frac{1}{2}")
    assert typeset("so $x^2$ is").startswith("so <math")
    assert typeset("a < b & c") == "a &lt; b &amp; c"
    assert typeset("it costs \\$5 and \\$6") == "it costs \\$5 and \\$6"
    assert typeset("$5 or $6") != ""
    assert "<mfrac" in answer("\\frac{1}{2}")
    assert answer("204") == "204"
    assert answer("<b>") == "&lt;b&gt;"
    for bad in (
        "\\href{javascript:alert(1)}{x}",
        "\\text{<script>alert(1)</script>}",
        "\\class{a}{x}",
        "\\frac{",
        "\\left(",
    ):
        found = Tags(typeset(f"${bad}$"))
        assert not {"script", "a"} & set(found.tags), bad
        assert not {"href", "class", "style"} & set(found.attributes), bad
    assert formula("x" * 5000) == ""
    assert typeset("put it in \\boxed{}.") == "put it in \\boxed{}.", "an empty box is told about, not filled"
    for text in ("\\boxed{\\frac{1}{2}}", "$\\boxed{2}$"):
        assert typeset(text).count('<mrow class="boxed">') == 1


def test_what_the_page_says(page, models):
    text = page.read_text()
    assert "3 of 3 problems of aime chose &lt;the&gt; checkpoint." in text
    assert "AIME24" in text  # as the papers have it
    assert "33.3" in text
    assert text.count('class="problem"') == 2 * 6
    assert "LUFFY v5, arXiv 2504.14945" in text
    assert f"{20_000 - CHARACTERS:,} characters" in text
    assert (page.with_suffix(".md").read_text(), page.with_suffix(".tex").read_text()) == (
        markdown(models),
        latex(models),
    )


def test_tables_for_a_paper(models):
    lines = markdown(models).splitlines()
    assert lines[0] == "| model | AIME24 | own | average |"
    assert lines[2].startswith("| mine | ")
    assert lines[-1].endswith("aime24 boxed-4, 4; own boxed-4, 4.")
    tex = latex(models)
    assert tex.count(r" \\") == 3
    assert "_{" in tex
    assert r"boxed-4" in tex.splitlines()[-1]


def test_names_that_two_sets_have_or_that_break_a_table(models):
    """`aime` is AIME 2024 where it has its 30 problems; two of one name keep their own."""

    def named(benchmark, questions):
        return replace(models[0].scores[0], benchmark=benchmark, questions=questions)

    assert titles([named("aime", 30), named("aime25", 30)]) == {"aime": "AIME24", "aime25": "AIME25"}
    assert titles([named("aime", 12), named("math", 50)]) == {"aime": "aime", "math": "math"}
    assert titles([named("aime", 30), named("aime24", 30)]) == {"aime": "aime", "aime24": "aime24"}
    table = markdown([Evaluated("a|b", models[0].scores, {})]).splitlines()
    assert "| a\\|b |" in table[2]
    assert len(shortened("x" * 9000, 300)) < 350


def test_published_numbers_beside_are_compared_over_all_of_the_benchmarks():
    """An average of theirs is of the same benchmarks as ours, or is none."""
    [one] = [one for one in beside({"aime24": 30, "arc_c": 1172}) if one.method == "LUFFY (500 steps)"]
    assert theirs(one, {"aime24": 30, "arc_c": 1172})["average"] == pytest.approx((29.4 + 80.5) / 2)
    assert theirs(one, {"aime24": 30, "mine": 7})["average"] is None
    assert theirs(one, {"aime24": 30, "mine": 7})["cells"] == [29.4, None]


def test_published_numbers_are_those_of_the_papers():
    if not CSV.exists():
        pytest.skip("needs ../shared/data")
    import csv

    with CSV.open() as file:
        rows = [(r["base_model"], r["method"], r["benchmark"], float(r["value_percent"])) for r in csv.DictReader(file)]
    ours = [(one.base_model, one.method, name, value) for one in published() for name, value in one.percent.items()]
    assert sorted(ours) == sorted(rows)
    assert {one.grader for one in published()} == {"oat", "math-verify", "not verified"}


def test_published_numbers_beside_ours():
    found = [
        one for one in beside({"aime": 30, "arc_c": 500}) if one.method.startswith("LUFFY") and one.grader == "oat"
    ]
    assert (29.4, 80.5) in [(one.percent.get("AIME24"), one.percent.get("ARC-c")) for one in found]
    assert beside({"mine": 30, "math": 12}) == []
    assert {name for one in published() for name in one.percent} == {*BENCHMARKS, "Avg-ID", "Avg-OOD"}


@pytest.mark.slow
def test_the_command_writes_it(tmp_path):
    model = make_model(tmp_path / "model")
    (tmp_path / "sums.jsonl").write_text(json.dumps({"prompt": "What is $1+1$?", "answer": "2"}) + "\n")
    options = ["--data", "sums.jsonl", "--model", model, "--max-tokens", "4", "--out", "out", "--report"]
    done = luffy("eval", *options, "report.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "<math" in (tmp_path / "report.html").read_text()
    assert {path.name for path in tmp_path.glob("report.*")} == {"report.html", "report.md", "report.tex"}
    done = luffy("eval", *options, "no/report.html", cwd=tmp_path)
    assert done.returncode == 2
    assert "the folder of --report no/report.html does not exist" in done.stderr


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_without_a_network(opened, page, width):
    tab, said, asked = opened(page, width)
    assert tab.title() == "Evaluation: mine, <b>other</b>"  # and no script of an answer has changed it
    assert (said, asked) == ([], [page.as_uri()])
    borders = "[...document.querySelectorAll('.boxed')].map(one => getComputedStyle(one).borderTopStyle)"
    assert set(tab.evaluate(borders)) == {"solid"}, "an answer in a box is seen to be in one"
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")  # wide tables scroll by themselves

    column = "[...document.querySelectorAll('#ours tbody tr td:first-child')].map(cell => cell.textContent)"
    head = tab.locator("#ours th").nth(2)
    head.locator("button").click()
    assert tab.evaluate(column) == ["mine", "<b>other</b>"]  # best first
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").press("Enter")  # from the keyboard, too
    assert tab.evaluate(column) == ["<b>other</b>", "mine"]

    tab.locator("#published-filter").fill("SFT")
    visible = "[...document.querySelectorAll('#published tbody tr')].filter(row => row.offsetParent)"
    assert tab.evaluate(f"{visible}.every(row => /sft/i.test(row.textContent)) && {visible}.length > 3")

    assert tab.locator("#count").text_content() == "12 of 12"
    tab.locator("#which").select_option("none")
    tab.locator("#model").select_option("mine")
    assert tab.locator("#count").text_content() == "2 of 12"
    tab.locator("#which").select_option("")
    first = tab.locator("details.problem").first
    first.locator("summary").click()
    drawn = first.locator("math mfrac").first.bounding_box()
    assert drawn["height"] > 8  # a fraction, not a line of text
    assert said == []
