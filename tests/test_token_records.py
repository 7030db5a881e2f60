"""Records of single tokens, of a real run: against the checkpoints' own weights in float64, and over a resume."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from test_train import arguments, assert_same_state
from test_update import groups, trainer
from tiny import ROOT, luffy, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from luffy.config import config_of
from luffy.config_file import load_config
from luffy.data import Example, Problem
from luffy.groups import Group, Row
from luffy.packing import pack
from luffy.sources import load_template, resolve
from luffy.token_file import NUMBERS, name_of, read, write
from luffy.token_records import MOST_TOKENS, TokenRecords, pieces, score, stored
from luffy.train import split, update

GAMMA = 0.2  # of the quickstart recipe


@pytest.fixture(scope="module")
def home(home) -> Path:
    done = luffy(*arguments(home / "whole", home / "model", train__steps=4, reward__grader="number"), cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    return home


def lines(run: Path, step: int) -> list[dict]:
    return read(run / "tokens" / f"step-{step:06d}.parquet")


def key(line: dict) -> tuple:
    return line["group"], line["is_trace"], tuple(line["token_ids"])


def test_a_file_an_evaluation(home):
    names = sorted(path.name for path in (home / "whole" / "tokens").iterdir())
    assert names == ["step-000000.parquet", "step-000002.parquet", "step-000004.parquet"]
    file = pq.ParquetFile(home / "whole" / "tokens" / names[1])
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


def test_the_same_groups_are_watched_and_fresh_ones_join(home):
    first, *later = (lines(home / "whole", step) for step in (0, 2, 4))
    assert len({line["group"] for line in first}) == 2
    assert all(line["watched"] and line["sampled"] == 1 for line in first)
    assert any(line["is_trace"] for line in first), "groups with a trace are taken where there are any"
    for step, found in zip((2, 4), later, strict=True):
        watched = [line for line in found if line["watched"]]
        assert [key(line) for line in watched] == [key(line) for line in first]
        fresh = [line for line in found if not line["watched"]]
        assert {line["sampled"] for line in fresh} == {step}
        assert len({line["group"] for line in fresh}) == 2


def assert_true(run: Path, step: int, folder: Path) -> None:
    """What was recorded at a step, against an independent pass of transformers in float64 over prompt and answer by the
    weights in `folder`, and against LUFFY's formulas."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    config = load_config(str(run / "config.toml"))
    template = load_template(resolve(config.model), config.model)
    compared = 0
    for line in lines(run, step):
        prompt = template.encode_prompt([{"role": "user", "content": line["question"]}])
        ids = torch.tensor([[*prompt, *line["token_ids"]]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1] / config.rollout.temperature
        logp = logits.log_softmax(-1)
        mine = logp.gather(1, ids[0, len(prompt) :, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)
        torch.testing.assert_close(torch.tensor(line["logp"]), mine.float(), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(line["entropy"]), entropy.float(), atol=2e-5, rtol=1e-5)
        p, advantage = mine.exp(), torch.tensor(line["advantage"], dtype=torch.float64)
        shaping = GAMMA * p / (p + GAMMA) ** 2 if line["is_trace"] else torch.ones_like(p)
        torch.testing.assert_close(torch.tensor(line["slope"]), (-advantage * shaping).float(), atol=1e-5, rtol=1e-4)
        compared += line["is_trace"]
    assert compared, "no trace was compared"


@pytest.mark.parametrize("step", [0, 2, 4])
def test_numbers_are_those_of_the_weights_at_that_step(home, step):
    run = home / "whole"
    assert_true(run, step, run / "checkpoints" / f"step-{step:06d}" if step else home / "model")


@pytest.mark.slow
def test_two_ranks_that_share_sequences_record_the_same(home, tmp_path):
    options = {"train__steps": 1, "mesh__sequence": 2, "reward__grader": "number"}
    done = luffy(*arguments(tmp_path / "two", home / "model", "--nproc-per-node", "2", **options), cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    for step, folder in ((0, home / "model"), (1, tmp_path / "two" / "checkpoints" / "step-000001")):
        assert_true(tmp_path / "two", step, folder)
    assert [line["example"] for line in lines(tmp_path / "two", 0)] == [
        line["example"] for line in lines(home / "whole", 0)
    ]


def test_what_is_stored_of_a_row(home):
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    for line in lines(home / "whole", 2):
        text = tokenizer.decode(line["token_ids"])  # where bytes are no text, how many stand for them is up to it
        assert "".join(line["tokens"]).replace("\ufffd", "") == text.replace("\ufffd", "")
        assert line["is_trace"] <= ("\ufffd" not in text)
        numbers = [len(line[name]) for name in ("tokens", "logp", "entropy", "advantage", "slope")]
        assert numbers == [line["length"]] * 5
        assert len(line["sampler_logp"]) == (0 if line["is_trace"] else line["length"])
        assert all(map(math.isfinite, line["logp"]))
    by_group: dict = {}
    for line in lines(home / "whole", 2):
        by_group.setdefault(line["group"], []).append(line)
    for rows in by_group.values():
        assert abs(sum(row["advantage"][0] for row in rows)) < 1e-4, "advantages of a group add up to nothing"


def test_characters_of_several_tokens_are_whole():
    tokenizer = make_tokenizer()  # of bytes
    ids = tokenizer.encode("n\u00e4 \u4e2d!", add_special_tokens=False)
    assert pieces(tokenizer, ids) == ["n", "", "\u00e4", " ", "", "", "\u4e2d", "!"]
    assert "".join(pieces(tokenizer, ids[:2] + ids[:1])) == "n\ufffdn"


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_same_records(home, tmp_path):
    """Taken back to step 2, with a file of a step that never was: what follows is written again, bit for bit."""
    run = tmp_path / "resumed"
    shutil.copytree(home / "whole", run)
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-000004")
    shutil.copy(run / "tokens" / "step-000004.parquet", run / "tokens" / "step-000009.parquet")
    (run / "tokens" / "step-000004.parquet").unlink()
    done = luffy(*arguments(run, home / "model", "--resume", train__steps=4, reward__grader="number"), cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (run / "tokens" / "step-000009.parquet").exists()
    assert lines(run, 4) == lines(home / "whole", 4)


@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_of_a_real_run_in_a_browser(home, opened, tmp_path, width):
    """Of the quickstart that is here, where there is one with records, and of this file's run of its recipe."""
    runs = [home / "whole"] + [path for path in [ROOT / "runs" / "quickstart"] if (path / "tokens").is_dir()]
    for number, run in enumerate(runs):
        page = tmp_path / f"{number}.html"
        done = luffy("report", run, "--out", page, cwd=home)
        assert done.returncode == 0, done.stderr
        assert page.stat().st_size <= 5e6
        tab, said, asked = opened(page, width)
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        plots = "[...document.querySelectorAll('svg.plot')].map(svg => svg.querySelectorAll('path').length)"
        drawn = tab.evaluate(plots)
        assert len(drawn) >= 8
        assert all(drawn)

        look = "[...document.querySelectorAll('.row span')].map(one => one.style.background).join()"
        newest = tab.evaluate(look)
        spans = tab.locator(".row", has_text="trace").first.locator(".text span")
        spans.first.hover()
        assert "token 1 of" in tab.locator("#told").text_content()
        tab.locator("#step").press("Home")
        assert tab.locator("#after").text_content() == "0"
        assert tab.evaluate(look) != newest, "the slider goes back to the weights before the first step"
        tab.locator("#group").select_option(index=tab.locator("#group option").count() - 1)
        assert tab.locator(".row").count() >= 2

        for _ in range(200):  # by the keyboard alone, from the top
            tab.keyboard.press("Tab")
            if tab.evaluate("document.activeElement.closest('#samples') !== null"):
                break
        tab.keyboard.press("Enter")
        assert tab.locator("#samples th[aria-sort]").count() == 1
        assert (said, asked) == ([], [page.as_uri()])


@pytest.mark.slow
def test_a_run_that_keeps_none_learns_the_same(home, tmp_path):
    """Bit for bit: looking at tokens changes nothing of a training."""
    run = tmp_path / "none"
    options = {"eval__token_groups": 0, "train__steps": 4, "reward__grader": "number"}
    done = luffy(*arguments(run, home / "model", **options), cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (run / "tokens").exists()
    assert_same_state(run, home / "whole", "step-000004")


def test_a_problem_with_several_answers_beside_one_with_one(tmp_path):
    t = SimpleNamespace(template=SimpleNamespace(tokenizer=make_tokenizer()))
    lines = []
    for number, answer in enumerate(["2", ("two", "2")]):
        problem = Problem(id="p", data_source="s", messages=({"role": "user", "content": "1+1?"},), answer=answer)
        group = Group(example=Example(problem, (1,), ()), rows=[Row(token_ids=(70,), text="a", sampler_logp=(-1.0,))])
        said = torch.full((1, len(NUMBERS)), 0.5)
        lines.append(
            {"group": number, "watched": True, "sampled": 1} | stored(t, group, group.rows[0], said, whole=True)
        )
    write(tmp_path / name_of(0), lines)
    found = read(tmp_path / name_of(0))
    assert [one["answer"] for one in found] == ["2", "two, 2"]
    assert found[0]["tokens"] == found[1]["tokens"]


def test_a_run_that_begins_anew_forgets_its_own_files_alone(tmp_path):
    for name in (name_of(0), name_of(10), "step-of-mine.parquet"):
        (tmp_path / name).write_text("")
    world = SimpleNamespace(is_main=True, everyone=lambda mine: [mine])
    TokenRecords(tmp_path, 2).resume(SimpleNamespace(world=world), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-of-mine.parquet"]


def test_long_rows_are_kept_whole_where_they_are_scored_again():
    t = SimpleNamespace(template=SimpleNamespace(tokenizer=make_tokenizer()))
    count = MOST_TOKENS + 5
    problem = Problem(id="p", data_source="s", messages=({"role": "user", "content": "1+1?"},), answer="2")
    row = Row(token_ids=(70,) * count, text="", sampler_logp=(-1.0,) * count, said={"value": torch.zeros(count)})
    group, said = Group(example=Example(problem, (1,), ()), rows=[row]), torch.zeros(count, len(NUMBERS))
    first, later = (stored(t, group, row, said, whole=whole) for whole in (True, False))
    for kept, most in ((first, count), (later, MOST_TOKENS)):
        assert (len(kept["token_ids"]), len(kept["sampler_logp"]), kept["length"]) == (most, most, count)
        assert len(kept["tokens"]) == len(kept["logp"]) == MOST_TOKENS
    assert len(first["said/value"]) == count
    assert "said/value" not in later


CASES = {
    "luffy": {},
    "luffy with weights": {"objective__trace_weight": 2.0, "objective__rollout_weight": 0.5},
    "luffy by sequences": {"objective__normalizer": "sequences"},
    "luffy that masks": {"correction__kind": "mask", "correction__low": 0.05, "correction__high": 5.0},
    "gspo": {},
    "cispo": {},
    "chord": {},
    "srft": {},
    "prefix_rft": {"objective__normalizer": 10.0},
    "sft": {},
}


@pytest.mark.parametrize("progress", [0.0, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_slopes_are_the_gradient_of_an_update(case, progress):
    """The weights move by what the slopes say, through the log-probs of each row by itself."""
    objective = case.split()[0]
    settings = {"optim__lr": 1.0, "optim__warmup_steps": 0, "optim__schedule": "constant"} | CASES[case]
    if hasattr(config_of(objective)().objective, "entropy_coef"):
        settings["objective__entropy_coef"] = 0.0
    t, batch = trainer(objective, **settings), groups()
    if objective == "prefix_rft":
        for group in batch:
            group.rows[0].prefix = 2
            group.rows[0].sampler_logp = (math.nan,) * 2 + group.rows[0].sampler_logp[2:]
    before = [p.detach().clone() for p in t.policy.parameters()]
    scored = score(t, batch, progress)
    assert all(row.advantage == 0 for group in batch for row in group.rows), "the groups stay as they were"

    total = torch.zeros(())
    for group, values in zip(batch, scored, strict=True):
        for row, value in zip(group.rows, values, strict=True):
            [alone] = pack([Group(example=group.example, rows=[row])], lambda one: one.rows, 1000)
            logp = t.policy(alone)
            assert torch.allclose(value[:, 0], logp.detach(), atol=1e-4, equal_nan=True)
            total = total + (value[:, -1].nan_to_num() * logp).sum()
    gradients = torch.autograd.grad(total, list(t.policy.parameters()))

    [part, *more] = split(t, batch, progress)
    assert not more
    update(t, [part], {"step": 1, "updates": 0, "bad_in_a_row": 0})
    largest = max(gradient.abs().max() for gradient in gradients) / part.normalizer
    assert largest > 1e-6
    for old, new, gradient in zip(before, t.policy.parameters(), gradients, strict=True):
        moved = old - new.detach()
        torch.testing.assert_close(moved, gradient / part.normalizer, atol=2e-4 * largest.item(), rtol=1e-3)
