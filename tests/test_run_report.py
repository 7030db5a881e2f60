"""`luffy report`: what it reads, what it warns of, and the page in a browser."""

import itertools
import json
import math
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tiny import luffy

from luffy.errors import UserError
from luffy.reporting.charts import PHASES
from luffy.reporting.command import REFRESH_S, served
from luffy.reporting.page import POINTS, render, thinned, write_report
from luffy.reporting.rules import RULES, findings
from luffy.reporting.runs import SAMPLES, load
from luffy.reporting.tokens import MOST_BYTES, MOST_STEPS, SIZES, bytes_of, spread, token_groups
from luffy.token_file import name_of, write

HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
HEALTHY = {
    "batch/rows": (32, 32),
    "batch/zero_rows": (0, 8),
    "batch/solve_none": (3, 0),
    "batch/solve_all": (0, 1),
    "on_off_metrics/on_score": (0.05, 0.6),
    "on_off_metrics/off_score": (1.0, 1.0),
    "on_off_metrics/on_response_length_mean": (30.0, 32.0),
    "response_length/clip_ratio": (0.3, 0.02),
    "actor/entropy_loss": (0.6, 0.2),
    "actor/off_policy_prob": (0.6, 0.9),
    "actor/loss": (0.01, 0.01),
    "actor/bad_updates": (0, 0),
    "rollout/kl_k3": (0.001, 0.001),
    "verify/timeouts": (0, 0),
    "verify/crashes": (0, 0),
    "timing_s/rollout": (2.0, 2.0),
    "timing_s/update": (3.0, 3.0),
    "perf/train_minutes": (0.1, 2.0),
}
ACCURACY = (0.05, 0.4, 0.6)


def make_run(path: Path, changes: dict | None = None, accuracy=ACCURACY, steps: int = 20, doubt: str = "") -> Path:
    """A run folder whose metrics go from the first value to the second. accuracy: intervals of 0.1 to both sides."""
    (path / "samples").mkdir(parents=True)
    (path / "config.toml").write_text(
        '[objective]\nname = "luffy"\n[model]\nname = "tiny"\n[data]\npath = "sums.jsonl"\n[train]\nsteps = 20\n'
    )
    environment = {"packages": {"torch": "2.13.0"}, "machine": {"cores": 2}, "prompts": {"doubt": doubt}}
    (path / "environment.json").write_text(json.dumps(environment))
    numbers = HEALTHY | (changes or {})
    lines = []
    for at in range(steps):
        share = at / max(1, steps - 1)
        ends = {key: value for key, value in numbers.items() if value is not None}
        lines.append({"step": at + 1} | {key: a + (b - a) * share for key, (a, b) in ends.items()})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evals = [
        {"step": 10 * at, "name": "heldout", "accuracy": value, "interval": [max(0, value - 0.1), value + 0.1]}
        for at, value in enumerate(accuracy)
    ]
    (path / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evals))
    answers = [
        {"id": f"a/{at}", "question": "What is $1+1$?", "response": HOSTILE if at == 3 else f"It is $\\boxed{{{at}}}$",
         "answer": "2", "reward": float(at == 2), "verdict": "ok", "tokens": 100 - at, "finished": at != 4}
        for at in range(6)
    ]  # fmt: skip
    for step in (0, 20):
        text = "".join(json.dumps(line | {"response": f"{line['response']} {step}"}) + "\n" for line in answers)
        (path / "samples" / f"heldout-step-{step:06d}.jsonl").write_text(text)
    return path


SUM = ("12", "+", "7", " is", "\n", "19", HOSTILE)


def add_tokens(run: Path, steps=(0, 10, 20), tokens=SUM, fresh=1, rows=1, since: int | None = None) -> None:
    """Records of a watched group, whose trace becomes likelier, and of fresh ones: since this step, else at the end."""
    (run / "tokens").mkdir(exist_ok=True)
    count = len(tokens)

    def row(at: int, trace: bool, **more) -> dict:
        p = [min(0.99, 0.05 + 0.1 * n + 0.2 * at) for n in range(count)]
        advantage = 0.5 if trace else -0.5
        slopes = [-advantage * (0.1 * x / (x + 0.1) ** 2 if trace else 1.0) for x in p]
        said = {"logp": [math.log(x) for x in p], "entropy": [1 - x for x in p]}
        said |= {"advantage": [advantage] * count, "slope": slopes}
        wrote = {"sampler_logp": [] if trace else [math.log(0.5)] * count, "behaviour": []}
        return {"id": "sum/1", "question": "What is 12+7?", "answer": "19", "is_trace": trace, "teacher": "T" * trace,
                "reward": float(trace), "verdict": "ok", "finished": True, "prefix": 0, "length": count,
                "tokens": list(tokens), "token_ids": list(range(count)), **said, **wrote, **more}  # fmt: skip

    for at, step in enumerate(steps):
        lines = [row(at, trace, group=0, watched=True, sampled=1) for trace in [False] * rows + [True]]
        count_fresh = fresh if step >= (steps[-1] if since is None else since) else 0
        lines += [row(at, False, group=1 + n, watched=False, sampled=step) for n in range(count_fresh)]
        write(run / "tokens" / name_of(step), lines)


def test_tokens_of_a_group_over_its_evaluations(tmp_path):
    run = make_run(tmp_path / "run")
    add_tokens(run)
    [watched, fresh], left = token_groups([load(str(run))])
    assert left == 0
    assert (watched["steps"], watched["sampled"], fresh["steps"]) == ([0, 10, 20], 1, [20])
    trace, rollout = watched["rows"]  # whatever the order in the file
    assert (rollout["trace"], trace["trace"], trace["teacher"]) == (False, True, "T")
    assert [values[0] for values in trace["logp"]] == pytest.approx([math.log(p) for p in (0.05, 0.25, 0.45)], abs=1e-3)
    assert len(fresh["rows"][0]["logp"]) == 1


@pytest.mark.parametrize("count", [1, 4])
def test_a_page_has_room_for_so_many_tokens(tmp_path, count):
    """Long rows are cut, evaluations thinned, the newest fresh groups taken; every run has its part."""
    runs = []
    for number in range(count):
        run = make_run(tmp_path / str(number))
        add_tokens(run, steps=range(0, 40), tokens=["\u4e2d"] * 3000, fresh=90)
        runs.append(load(str(run)))
    groups, left = token_groups(runs)
    assert MOST_BYTES / 2 < sum(map(bytes_of, groups)) <= MOST_BYTES
    watched = [group for group in groups if len(group["steps"]) > 1]
    assert [group["run"] for group in watched] == list(range(count))
    assert watched[0]["steps"][0] == 0
    assert watched[0]["steps"][-1] == 39
    assert len(watched[0]["rows"][0]["tokens"]) == SIZES[0][1] < watched[0]["rows"][0]["length"] == 3000
    assert len(groups) + left == 91 * count
    assert left > 0
    page = tmp_path / "page.html"
    write_report(page, runs)
    assert page.stat().st_size < 5e6
    assert f"{left} more have no room" in page.read_text()


def test_a_group_of_many_long_rows_is_cut_until_it_fits(tmp_path):
    run = make_run(tmp_path / "run")
    add_tokens(run, tokens=["x"] * 2048, rows=64)
    groups, left = token_groups([load(str(run))])
    assert len(groups[0]["rows"]) == 65
    assert len(groups[0]["rows"][0]["tokens"]) < SIZES[0][1]
    assert len(groups) + left == 2


def test_a_damaged_file_of_tokens(tmp_path):
    run = make_run(tmp_path / "run")
    add_tokens(run)
    newest = run / "tokens" / name_of(20)
    newest.write_bytes(newest.read_bytes()[:200])
    (run / "tokens" / "step-other.parquet").write_text("not ours")
    done = luffy("report", run, cwd=tmp_path)
    assert done.returncode == 2
    assert f"luffy: tokens: {newest} is not a Parquet file of token records" in done.stderr
    assert done.stderr.count("\n") == 1


def test_checkpoints_are_thinned_evenly():
    assert spread([0, 10, 20], MOST_STEPS) == [0, 10, 20]
    kept = spread(list(range(101)), 5)
    assert kept == [0, 25, 50, 75, 100]


def test_a_run_without_token_records_has_no_token_view(tmp_path):
    run = load(str(make_run(tmp_path / "run")))
    text = render([run])
    assert "GROUPS" not in text
    assert 'id="measure"' not in text


def test_a_healthy_run_has_nothing_said_against_it(tmp_path):
    assert findings(load(str(make_run(tmp_path / "run")))) == []


CAUSES = {
    "numbers that are not finite": ({"actor/bad_updates": (1, 1)}, ACCURACY),
    "a verifier that turns down verified traces": ({"on_off_metrics/off_score": (0.0, 0.0)}, ACCURACY),
    "verifier timeouts": ({"verify/timeouts": (4, 4)}, ACCURACY),
    "a sampler whose weights fall behind": ({"rollout/kl_k3": (0.001, 0.2)}, ACCURACY),
    "prompts in a form that the model does not know": (
        {"response_length/clip_ratio": (1.0, 1.0), "on_off_metrics/on_score": (0.0, 0.0)},
        (0.0, 0.0),
    ),
    "truncated answers": ({"response_length/clip_ratio": (0.1, 0.9)}, ACCURACY),
    "updates that are too large": ({}, (0.1, 0.4, 0.02)),
    "groups without signal": ({"batch/zero_rows": (32, 32)}, ACCURACY),
    "entropy collapse": ({"actor/entropy_loss": (0.6, 0.001)}, (0.3, 0.3)),
    "reward that comes from length": (
        {"on_off_metrics/on_response_length_mean": (30, 200)},
        (0.4, 0.4),
    ),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_the_first_warning_names_the_cause(cause, tmp_path):
    changes, accuracy = CAUSES[cause]
    found = findings(load(str(make_run(tmp_path / "run", changes, accuracy))))
    assert found[0].cause == cause
    assert found[0].seen
    assert found[0].remedy


FROZEN = "a sampler whose weights fall behind"
AHEAD = {"rollout/staleness_max": (1, 1)}


@pytest.mark.parametrize(
    ("changes", "steps", "warns"),
    [
        (
            {"rollout/kl_k3": (0.002, 0.24), "rollout/staleness_max": (0, 0)},
            4,
            True,
        ),  # so far a run gets before it stops
        ({"rollout/kl_k3": (0.002, 0.015)}, 20, False),
        ({"rollout/kl_k3": (0.01, 0.04)}, 20, False),  # coarse rounding from the first step on
        ({"rollout/kl_k3": (0.001, 0.3)} | AHEAD, 20, False),  # as docs/correction.md has it for sampling ahead
        ({"rollout/kl_k3": (0.001, 2.0)} | AHEAD, 20, True),
    ],
)
def test_old_weights_are_told_from_rounding_and_from_sampling_ahead(changes, steps, warns, tmp_path):
    found = [one.cause for one in findings(load(str(make_run(tmp_path / "run", changes, steps=steps))))]
    assert found == [FROZEN] * warns


DOUBT = "prompts have none of <|im_start|>"
FAILS = {"on_off_metrics/on_score": (0.04, 0.04)}


@pytest.mark.parametrize(
    ("changes", "doubt", "first"),
    [
        (FAILS, DOUBT, "prompts in a form that the model does not know"),
        (FAILS | {"rollout/kl_k3": (0.001, 0.2)}, DOUBT, FROZEN),
        (FAILS, "", "updates that are too large"),
        ({}, DOUBT, "updates that are too large"),  # it learned from these prompts for a while
    ],
)
def test_a_doubt_about_prompts_explains_a_run_that_fails_and_no_other(changes, doubt, first, tmp_path):
    run = load(str(make_run(tmp_path / "run", changes, (0.1, 0.4, 0.02), doubt=doubt)))
    assert findings(run)[0].cause == first


def test_a_model_that_stopped_ending_answers_is_not_blamed_on_its_prompts(tmp_path):
    changes = {"response_length/clip_ratio": (0.3, 0.9), "on_off_metrics/on_score": (0.0, 0.0)}
    assert findings(load(str(make_run(tmp_path / "run", changes))))[0].cause == "truncated answers"


def test_a_fall_that_chance_explains_is_none(tmp_path):
    assert findings(load(str(make_run(tmp_path / "run", accuracy=(0.17, 0.06))))) == []


def test_every_rule_is_seen_at_work(tmp_path):
    seen = set()
    for number, (changes, accuracy) in enumerate(CAUSES.values()):
        run = load(str(make_run(tmp_path / str(number), changes, accuracy)))
        seen |= {rule.__name__ for rule in RULES if list(rule(run))}
    assert seen == {rule.__name__ for rule in RULES}


def test_a_run_that_was_judged_twice_after_a_step_counts_once(tmp_path):
    run = make_run(tmp_path / "run")
    again = {"step": 20, "name": "heldout", "accuracy": 0.5, "interval": [0.4, 0.6]}
    with (run / "evals.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    assert load(str(run)).accuracy("heldout")[-1] == (20, 0.5, 0.4, 0.6)
    assert [step for step, *_ in load(str(run)).accuracy("heldout")] == [0, 10, 20]


def test_a_run_of_two_steps_has_no_trends(tmp_path):
    changes = {"rollout/kl_k3": (0.001, 0.2), "actor/entropy_loss": (0.6, 0.001), "batch/zero_rows": (32, 32)}
    assert findings(load(str(make_run(tmp_path / "run", changes, (0.3, 0.3), steps=2)))) == []


def test_a_long_run_is_thinned_and_ends_where_it_ended():
    points = [(at, at / 7) for at in range(10_000)]
    found = thinned(points)
    assert len(found) <= POINTS + 1
    assert found[0][0] == 0
    assert found[-1][0] == 9999


def test_what_cannot_be_reported(tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        load(str(tmp_path))
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no step yet"):
        load(str(run))
    done = luffy("report", run, cwd=tmp_path)
    assert done.returncode == 2
    assert "come back after the first, or let --watch wait" in done.stderr


def test_the_command(tmp_path):
    make_run(tmp_path / "one", {"verify/timeouts": (4, 4)})
    make_run(tmp_path / "two")
    done = luffy("report", "one", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "one: verifier timeouts" in done.stderr
    assert "two:" not in done.stderr
    page = tmp_path / "one" / "report.html"
    assert page.stat().st_size < 5 << 20
    assert "verifier timeouts" in page.read_text()
    for options, words in [
        (("none",), "none is no run folder"),
        (("one", "one"), "named twice"),
        (("one", "--watch", "--out", "x.html"), "choose one"),
    ]:
        done = luffy("report", *options, cwd=tmp_path)
        assert done.returncode == 2
        assert words in done.stderr


def asked(where: str, method: str = "GET") -> tuple[int, str]:
    try:
        answer = urllib.request.urlopen(urllib.request.Request(where, method=method))
    except urllib.error.HTTPError as error:
        answer = error
    return answer.status, answer.read().decode()


def test_a_run_is_watched_while_it_trains(tmp_path):
    run = make_run(tmp_path / "run", steps=10)
    add_tokens(run)
    metrics, newest = run / "metrics.jsonl", run / "tokens" / name_of(20)
    steps, records = metrics.read_text(), newest.read_bytes()
    metrics.write_text("")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "luffy", "report", str(run), "--watch", "--port", port]
    server = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background may ignore it
    )
    try:
        assert where in server.stdout.readline()
        assert asked(where, "HEAD") == (200, "")
        status, text = asked(where)
        assert status == 200
        assert f"Waits for the first step of {run}." in text
        assert "location.reload" in text
        metrics.write_text(steps)
        status, text = asked(where)
        assert status == 200
        assert "10 of 20" in text
        assert "location.reload" in text
        with metrics.open("a") as file:
            file.write(json.dumps({"step": 11, "actor/loss": 0.5}) + "\n")
        assert "11 of 20" in asked(where)[1]
        newest.write_bytes(records[:200])
        assert asked(where, "HEAD") == (503, "")
        status, text = asked(where)
        assert status == 503
        assert "is not a Parquet file" in text
        assert "location.reload" in text, "a page that finds out when there is a report again"
        assert asked(f"{where}../etc/passwd")[0] == asked(f"{where}x", "HEAD")[0] == 404
        other = luffy("report", run, "--watch", "--port", port, cwd=tmp_path)
        assert other.returncode == 2
        assert "--port" in other.stderr
    finally:
        server.send_signal(signal.SIGINT)
        began = time.monotonic()
        server.wait(10)
    assert time.monotonic() - began < 5
    assert server.returncode in (0, -2, 130)


def test_nothing_of_a_run_becomes_part_of_the_page(tmp_path):
    run = load(str(make_run(tmp_path / "run")))
    run.name = HOSTILE
    text = render([run])
    assert text.count("<script>") == text.count("</script>") == 1
    assert 'onerror="document' not in text
    assert len(run.samples) == 6 <= SAMPLES
    assert {line["step"] for line in run.samples} == {20}


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_without_a_network(opened, tmp_path, width):
    runs = [
        load(str(make_run(tmp_path / name, changes)))
        for name, changes in [("one", None), ("two", {"batch/zero_rows": (32, 32)})]
    ]
    page = tmp_path / "report.html"
    write_report(page, runs)
    tab, said, asked = opened(page, width)
    assert tab.title() == f"Runs: {runs[0].name}, {runs[1].name}"
    assert (said, asked) == ([], [page.as_uri()])
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate(BORDERS) == ["solid"] * 10, "an answer in a box is seen to be in one"
    assert tab.evaluate(CENTRES) < 1, "a slider is level with its name"
    legend = tab.locator(".chart", has_text="Rows without gradient").locator(".legend span")
    assert [one.text_content().strip() for one in legend.all()] == ["without gradient", "all"]
    assert "`" not in tab.locator("body").inner_text()
    keys = tab.locator(".card").first.locator(".keys span")
    assert [one.inner_text().split()[0] for one in keys.all()] == list(PHASES)
    assert tab.evaluate(HUES) == [], "a phase's name has the colour of its part of the bar"
    assert "groups without signal" in tab.locator(".warn").first.text_content()

    drawn = "[...document.querySelectorAll('.chart svg.plot')].map(svg => svg.querySelectorAll('path.curve').length)"
    counts = tab.evaluate(drawn)
    assert len(counts) >= 8
    assert min(counts) >= 2  # a line for each run
    chart = tab.locator(".chart", has_text="Reward").first
    before = chart.locator("path.curve:not(.faint)").first.get_attribute("d")
    tab.locator("#smooth").fill("0")
    assert chart.locator("path.curve:not(.faint)").first.get_attribute("d") != before
    plot = chart.locator("svg.plot")
    plot.hover()
    assert "step " in chart.locator("output").text_content()
    assert "traces 1" in chart.locator("output").text_content()
    plot.press("End")
    assert chart.locator("output").text_content().startswith("step 20: ")
    plot.press("ArrowLeft")
    assert chart.locator("output").text_content().startswith("step 19: ")

    tokens = tab.locator("#samples th").last.locator("button")
    tokens.click()
    order = (
        "[...document.querySelectorAll('#samples tbody tr td:last-child')].map(cell => parseInt(cell.dataset.value))"
    )
    assert tab.evaluate(order) == sorted(tab.evaluate(order), reverse=True)
    tokens.press("Enter")
    assert tab.evaluate(order) == sorted(tab.evaluate(order))
    tab.locator("#which").select_option("1")
    assert tab.locator("#count").text_content() == "2 of 12"


TICKS = """[...document.querySelectorAll('svg.plot')].map(svg => [...svg.querySelectorAll('.tick')].map(one => {
    const box = one.getBBox(), right = svg.viewBox.baseVal.width - box.x - box.width;
    return [one.textContent, box.x, right, one.getAttribute('text-anchor')]; }))"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(
    ("ends", "labels"),
    [
        ((0.003429, 0.002257), ["0.0025", "0.003"]),
        ((1e-7, 2e-7), ["1e-7", "1.5e-7", "2e-7"]),
        ((1e-7, 1.3e-7), ["1e-7", "1.1e-7", "1.2e-7", "1.3e-7"]),
        ((123456, 234567), ["1.5e+5", "2e+5"]),
        ((0.99999, 1.00001), ["0.99", "1", "1.01"]),
    ],
)
def test_every_number_beside_an_axis_is_whole_and_round(opened, tmp_path, ends, labels, width):
    run = make_run(tmp_path / "run", {"rollout/kl_k3": ends, "actor/lr": ends, "perf/tokens_per_s": ends}, steps=2000)
    page = tmp_path / "report.html"
    write_report(page, [load(str(run))])
    tab, said, _ = opened(page, width)
    charts = tab.evaluate(TICKS)
    assert min(min(left, right) for ticks in charts for _, left, right, _ in ticks) >= 0
    for ticks in charts:
        beside = [float(text) for text, _, _, anchor in ticks if anchor == "end"]
        steps = [b - a for a, b in itertools.pairwise(beside)]
        assert len(beside) >= 2
        assert min(steps) > 0
    at = [chart.locator("h3").text_content() for chart in tab.locator(".chart").all()].index("Sampler against trainer")
    assert [text for text, _, _, anchor in charts[at] if anchor == "end"] == labels
    assert said == []


def test_a_run_of_one_step_has_a_mark_in_every_chart(opened, tmp_path):
    page = tmp_path / "report.html"
    write_report(page, [load(str(make_run(tmp_path / "run", accuracy=(0.062,), steps=1)))])
    tab, said, _ = opened(page, 1280)
    marks = "[...document.querySelectorAll('svg.plot')].map(svg => svg.querySelectorAll('circle').length)"
    assert len(tab.evaluate(marks)) >= 8
    assert min(tab.evaluate(marks)) >= 1
    accuracy = tab.locator(".card dt", has_text="heldout").locator("+ dd").text_content()
    assert accuracy.startswith("6.2 % (")
    assert said == []


@pytest.fixture
def served_at(browser):
    """A tab at a page that `luffy report --watch` would serve of these runs, with a clock of the test's own."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab, said = context.new_page(), []
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.clock.install()

    def answer(route, names: list[str]) -> None:
        status, text = served(names)
        route.fulfill(status=status, content_type="text/html", body="" if route.request.method == "HEAD" else text)

    def open_at(*runs: Path):
        context.route("http://run.test/", lambda route: answer(route, [str(run) for run in runs]))
        tab.goto("http://run.test/")
        return tab

    yield open_at
    assert said == []
    context.close()


def refreshed(tab) -> None:
    tab.evaluate("window.old = true")
    tab.clock.fast_forward(1000 * REFRESH_S)
    tab.wait_for_function("!window.old")
    tab.wait_for_load_state()


def test_a_page_that_waits_becomes_the_report(served_at, tmp_path):
    run = make_run(tmp_path / "run")
    metrics = run / "metrics.jsonl"
    steps = metrics.read_text()
    metrics.write_text("")
    tab = served_at(run)
    assert tab.locator("[role=status]").text_content() == f"Waits for the first step of {run}."
    refreshed(tab)
    assert tab.title() == "No step yet"
    metrics.write_text(steps)
    refreshed(tab)
    assert tab.title() == f"Runs: {run}"
    metrics.rename(run / "away")
    (run / "config.toml").rename(run / "config")
    tab.clock.fast_forward(1000 * REFRESH_S)
    tab.wait_for_timeout(300)
    assert tab.title() == f"Runs: {run}", "as long as the server has no other, the page stays"
    tab.reload()
    assert tab.title() == "No report"
    metrics.write_text(steps)
    (run / "config").rename(run / "config.toml")
    refreshed(tab)
    assert tab.title() == f"Runs: {run}"


def test_a_page_that_is_brought_up_to_date_shows_what_one_looks_at(served_at, tmp_path):
    run = make_run(tmp_path / "run")
    add_tokens(run)
    tab = served_at(run)
    chosen, step = tab.locator("#group option:checked"), tab.locator("#step")
    told, responses = tab.locator("#told"), tab.locator("#samples tbody td:last-child")

    tab.locator("#smooth").fill("0.2")
    tab.locator("#measure").select_option("entropy")
    tab.locator("#which").select_option("0")
    tab.locator("#samples th").last.locator("button").click()
    tab.locator("#samples th").last.locator("button").click()
    order = [one.get_attribute("data-value") for one in responses.all()]
    assert order == sorted(order, key=float)
    tab.locator("#group").select_option(index=1)
    tab.locator(".row .text").focus()
    for key in ("Home", "ArrowRight", "ArrowRight"):
        tab.keyboard.press(key)
    before = told.text_content()
    assert "token 3 of 7" in before
    assert "sampled in step 20" in chosen.text_content()

    add_tokens(run, steps=range(0, 31, 10), since=20)
    refreshed(tab)
    assert tab.locator("#group option").nth(1).text_content() == "sum/1 (sampled in step 30)"
    assert chosen.text_content() == "sum/1 (sampled in step 20)", "another group now has its place"
    assert told.text_content() == before
    tab.keyboard.press("ArrowRight")
    assert "token 4 of 7" in told.text_content()
    assert tab.locator("#measure").input_value() == "entropy"
    assert tab.locator("#smooth").input_value() == "0.2"
    assert tab.locator("#which").input_value() == "0"
    assert [one.get_attribute("data-value") for one in responses.all()] == order

    tab.locator("#group").select_option(index=0)
    assert tab.locator("#after").text_content() == "30"
    add_tokens(run, steps=range(0, 41, 10), since=20)
    refreshed(tab)
    assert tab.locator("#after").text_content() == "40", "who looked at the newest step does so again"
    step.fill("1")
    add_tokens(run, steps=range(0, 51, 10), since=20)
    refreshed(tab)
    assert tab.locator("#after").text_content() == "10"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_tokens_in_a_browser(opened, tmp_path, width, scheme):
    run = make_run(tmp_path / "run")
    text = (run / "config.toml").read_text().replace('name = "luffy"', 'name = "luffy"\ngamma = 0.1')
    (run / "config.toml").write_text(text)
    add_tokens(run)
    page = tmp_path / "report.html"
    write_report(page, [load(str(run))])
    tab, said, _ = opened(page, width, scheme)
    assert tab.title().startswith("Runs: ")
    assert tab.locator(".row").count() == 2
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")

    trace = tab.locator(".row", has_text="trace of T").locator(".text")
    spans, told = trace.locator("span"), tab.locator("#told")
    spans.nth(0).hover()
    assert "trace of T, token 1 of 7: probability 0.45" in told.text_content(), "the newest weights come first"
    assert "shaping weight 0.149" in told.text_content()  # 0.1 * 0.45 / 0.55^2
    assert "change since step 0 0.4" in told.text_content()
    rollout = tab.locator(".row", has_text="rollout 1").locator(".text span")
    rollout.nth(0).hover()
    assert "ratio 0.9," in told.text_content()  # 0.45 of the policy over 0.5 of the sampler
    p = [min(0.99, 0.45 + 0.1 * n) for n in range(7)]
    slopes = {"trace": [0.5 * 0.1 * x / (x + 0.1) ** 2 for x in p], "rollout": [0.5] * 7}
    parts = {name: [slope * (1 - x) for slope, x in zip(of, p, strict=True)] for name, of in slopes.items()}
    whole = sum(map(sum, parts.values()))
    assert f"gradient share {100 * parts['rollout'][0] / whole:.0f} %" in told.text_content()
    said_of = tab.locator(".row", has_text="trace of T").locator("p")
    assert f"{100 * sum(parts['trace']) / whole:.0f} % of the group's gradient" in said_of.first.text_content()
    assert said_of.last.text_content() == "No token is less likely than 0.2."
    assert tab.locator("#shape path").count() == 2
    scale = "[...document.getElementById('scale').getContext('2d').getImageData(0, 0, 176, 1).data].join()"
    assert len(set(tab.evaluate(scale).split(","))) > 20

    tab.locator("#measure").select_option("probability")
    tab.locator("#step").fill("0")
    assert tab.locator("#after").text_content() == "0"
    trace.focus()
    trace.press("Home")
    assert "token 1 of 7: probability 0.05" in told.text_content()
    tab.locator("#step").fill("1")
    assert "token 1 of 7: probability 0.25" in told.text_content(), "a token is followed over the steps"
    assert tab.locator("#step").get_attribute("aria-valuetext") == "step 10"
    tab.locator("#step").fill("0")
    p = [0.05 + 0.1 * n for n in range(7)]
    shaped = [0.1 * x / (x + 0.1) ** 2 * (1 - x) for x in p]
    plain = [x * (1 - x) for x in p]
    has, had = (100 * sum(values[:2]) / sum(values) for values in (shaped, plain))
    expected = f"{100 * 2 / 7:.0f} % of the trace, {has:.0f} % of its gradient; unshaped (weight p) {had:.0f} %."
    assert said_of.last.text_content() == f"Tokens less likely than 0.2: {expected}"
    trace.focus()
    trace.press("Home")
    trace.press("ArrowRight")
    assert "token 2 of 7: probability 0.15" in told.text_content()
    contrasts = tab.evaluate(CONTRASTS)
    assert min(contrasts) >= 4.5, "text is readable on every colour"
    before = [one.get_attribute("style") for one in spans.all()]
    lightness = tab.evaluate(LIGHTNESS)
    assert lightness == sorted(lightness, reverse=scheme == "dark"), "strength is seen without colours"
    tab.locator("#step").fill("2")
    after = [one.get_attribute("style") for one in spans.all()]
    assert before[0] != after[0], "the slider changes what is seen"

    looks = set()
    for measure in tab.locator("#measure option").all():
        tab.locator("#measure").select_option(measure.get_attribute("value"))
        looks.add("".join(one.get_attribute("style") or "" for one in tab.locator(".row span").all()))
        assert min(tab.evaluate(CONTRASTS)) >= 4.5, measure.get_attribute("value")
    assert len(looks) == tab.locator("#measure option").count() == 7, "every measure has colours of its own"
    tab.locator("#group").select_option(index=1)
    assert tab.locator(".row").count() == 1
    assert tab.locator("#step").is_disabled()
    assert (said, tab.title().startswith("Runs: ")) == ([], True), "a token's text is text"


def test_a_page_that_moves_under_a_resting_pointer_says_nothing_new(opened, tmp_path):
    run = make_run(tmp_path / "run")
    add_tokens(run)
    page = tmp_path / "report.html"
    write_report(page, [load(str(run))])
    tab, said, _ = opened(page, 1280)
    trace, told = tab.locator(".row", has_text="trace of T").locator(".text"), tab.locator("#told")
    trace.press("Home")
    assert "trace of T, token 1 of 7" in told.text_content()
    box = tab.locator(".row", has_text="rollout 1").locator(".text span").nth(3).bounding_box()
    tab.mouse.move(box["x"] + 4, box["y"] - 30)
    tab.evaluate("document.getElementById('rows').style.marginTop = '-34px'")
    for _ in range(3):  # a browser says with its own frames that something else is under the pointer
        tab.screenshot()
        tab.wait_for_timeout(100)
    assert "trace of T, token 1 of 7" in told.text_content()
    tab.mouse.move(box["x"] + 5, box["y"] - 30)
    assert "rollout 1, token 4 of 7" in told.text_content()
    assert said == []


def test_a_finger_on_a_token_says_its_numbers(browser, tmp_path):
    run = make_run(tmp_path / "run")
    add_tokens(run)
    page = tmp_path / "report.html"
    write_report(page, [load(str(run))])
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, offline=True)
    tab = context.new_page()
    tab.goto(page.as_uri())
    tab.locator(".row .text span").nth(2).tap()
    assert "token 3 of 7" in tab.locator("#told").text_content()
    context.close()


BORDERS = "[...document.querySelectorAll('#samples .boxed')].map(one => getComputedStyle(one).borderTopStyle)"
CENTRES = """Math.max(...[...document.querySelectorAll('label:has([type=range])')].map(one => {
    const text = document.createRange(); text.selectNode(one.firstChild);
    const [a, b] = [text, one.querySelector('input')].map(part => part.getBoundingClientRect());
    return Math.abs(a.top + a.bottom - b.top - b.bottom) / 2; }))"""
HUES = """[...document.querySelectorAll('.card')].flatMap(card => {
    const [bar, keys] = ['.phases i', '.keys i'].map(one => [...card.querySelectorAll(one)]
        .map(part => getComputedStyle(part).backgroundColor));
    return new Set(bar).size === bar.length ? bar.filter((hue, at) => hue !== keys[at]) : bar; })"""
_LUMINANCE = """const lum = text => { const [r, g, b] = text.match(/[0-9.]+/g).map(one => (one /= 255) <= 0.04045
    ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const spans = [...document.querySelectorAll('.row span')].filter(one => one.style.background);"""
CONTRASTS = f"""() => {{ {_LUMINANCE} return spans.map(one => {{
    const [a, b] = [getComputedStyle(one).color, getComputedStyle(one).backgroundColor].map(lum);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }}); }}"""
LIGHTNESS = f"""() => {{ {_LUMINANCE} const row = [...document.querySelectorAll('.row')].at(0);
    return spans.filter(one => row.contains(one)).map(one => lum(getComputedStyle(one).backgroundColor)); }}"""
