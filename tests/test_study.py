"""The study: what is due, which rate wins, what is stored, and that docs/study.md shows the stored results."""

import dataclasses
import json
from statistics import fmean, stdev

import pytest

from bench import study_report
from bench.presets import ALL, METHODS, PRESETS, corpus_parts
from bench.report import ROOT
from bench.study import SEEDS, TUNING_SEED, Results, Run, due, planned, recipe
from luffy.config import load_config
from luffy.data import load_problems

TINY = PRESETS["tiny"]


@pytest.fixture
def preset(tmp_path, monkeypatch):
    monkeypatch.setenv("LUFFY_CACHE", str(tmp_path / "cache"))
    few = {name: METHODS[name] for name in ("sft", "on-policy", "luffy")}
    return dataclasses.replace(TINY, methods=few, results=tmp_path / "study.json")


def found(heldout: float, answer: float = 20.0) -> dict:
    scores = {"heldout": heldout, "skills": 0.5}
    curves = {"reward": [0.1, heldout]}
    return {"seconds": 1.0, "before": scores, "after": scores, "answer_tokens": answer, "curves": curves}


def test_rates_are_tried_first_and_the_best_runs_on_other_seeds_and_traces(preset):
    results = Results(preset)
    tuning = due(results)
    assert [run.key for run in tuning[:3]] == [f"sft/perfect/{lr:g}/0" for lr in preset.lrs["supervised"]]
    assert len(tuning) == 9
    for run, heldout in zip(tuning, [0.2, 0.9, 0.9, *[0.5] * 6], strict=True):
        results.add(run, found(heldout))
    assert results.best("sft") == preset.lrs["supervised"][1], "of equals the lower one"
    after = due(results)
    assert {run.seed for run in after} == set(SEEDS)
    assert TUNING_SEED not in SEEDS
    assert len(tuning) + len(after) == planned(preset)
    assert {run.traces for run in after if run.method == "on-policy"} == {"perfect"}
    assert {run.traces for run in after if run.method == "luffy"} == set(ALL)
    for run in after:
        results.add(run, found(0.7))
    assert due(results) == []
    assert due(Results(preset)) == [], "what is stored is not run again"


def test_runs_of_another_recipe_are_missing(preset):
    results = Results(preset)
    results.add(Run("sft", "perfect", 1e-3, 1), found(0.5))
    results.add(Run("luffy", "perfect", 1e-4, 1), found(0.5))
    assert len(Results(preset).runs) == 2
    changed = dataclasses.replace(preset.methods["luffy"], options={"objective.name": "luffy", "objective.gamma": 0.2})
    one = dataclasses.replace(preset, methods=preset.methods | {"luffy": changed})
    assert [run["method"] for run in Results(one).runs.values()] == ["sft"]
    assert not Results(dataclasses.replace(preset, steps=51)).runs
    assert recipe(preset, "sft") != recipe(preset, "luffy")


@pytest.mark.parametrize("name", PRESETS)
def test_every_run_has_a_configuration_and_methods_share_data_and_rows(name, preset, monkeypatch):
    chosen = PRESETS[name]
    rows = set()
    for method in chosen.methods.values():
        for traces in chosen.traces:
            stages = list(chosen.stages(method, traces, 1e-4, 3))
            configs = [load_config("quickstart", [f"--{k}={v}" for k, v in options.items()]) for options in stages]
            assert sum(config.train.steps for config in configs) == chosen.steps
            for config in configs:
                assert config.train.seed == config.data.problems.seed == 3
                rows.add(config.train.prompts_per_step * getattr(config.objective, "rows", 1))
    assert rows == {chosen.prompts * chosen.rows}


def test_problems_to_judge_by_are_never_trained_on(preset):
    [options] = preset.stages(METHODS["luffy"], "perfect", 1e-4, 2)
    judged = list(load_problems(options["eval.path"]))
    assert {p.data_source for p in judged} == {"heldout", "longer", "skills"}
    taught = {row["prompt"][-1]["content"] for part in corpus_parts() for row in part}
    assert not taught & {p.messages[-1]["content"] for p in judged}
    config = load_config("quickstart", [f"--{key}={value}" for key, value in options.items()])
    assert config.data.problems.heldout
    other = {p.messages[-1]["content"] for p in load_problems(preset.judged_by(3)["eval.path"])}
    assert len(other & {p.messages[-1]["content"] for p in judged}) < len(judged) / 2, (
        "seeds have problems of their own"
    )


def test_intervals_are_students():
    values = [0.5, 0.6, 0.9]
    mean, half = study_report.mean_and_half(values)
    assert mean == pytest.approx(fmean(values))
    assert half == pytest.approx(4.303 * stdev(values) / 3**0.5)


def test_the_page_shows_what_is_stored():
    if not TINY.results.exists():
        pytest.skip("nothing is stored")
    results = Results(TINY)
    assert len(results.runs) == len(json.loads(TINY.results.read_text())), (
        "runs of another recipe: python -m bench.study"
    )
    page = (ROOT / "docs" / "study.md").read_text()
    for table in (study_report.methods_table, study_report.traces_table, study_report.rates_table):
        assert "\n".join(table(results)) in page
