"""The study: what is due, which rate wins, what is stored, and that docs/study.md shows the stored results."""

import dataclasses
import json
from statistics import fmean, stdev

import pytest

from bench import presets, study_report
from bench.presets import ALL, METHODS, PRESETS, corpus_parts
from bench.report import ROOT
from bench.study import SEEDS, TUNING_SEED, Results, Run, due, planned, recipe
from luffy.config_file import load_config
from luffy.data import load_problems

TINY = PRESETS["tiny"]


@pytest.fixture
def preset(tmp_path, monkeypatch):
    monkeypatch.setenv("LUFFY_CACHE", str(tmp_path / "cache"))
    few = {name: METHODS[name] for name in ("sft", "on-policy", "sft-rl", "luffy")}
    return dataclasses.replace(TINY, methods=few, results=tmp_path / "study.json")


def found(heldout: float, base: str = "taught") -> dict:
    scores = {"heldout": heldout, "skills": 0.5}
    curves = {"reward": [0.1, heldout], "p(trace)": [None, 0.5]}
    return {
        "base": base,
        "seconds": 1.0,
        "before": scores,
        "after": scores,
        "answer_tokens": 20.0,
        "curves": curves,
    }


def tune(results: Results, method: str, scores: list[float]) -> None:
    for run, score in zip(results.tuning(method), scores, strict=True):
        results.add(run, found(score))


def test_rates_are_tried_first_and_the_best_runs_on_other_seeds_and_traces(preset):
    results = Results(preset)
    assert {run.seed for run in due(results)} == {TUNING_SEED}
    assert [run.lr for run in due(results) if run.method == "sft"] == list(preset.lrs["supervised"])
    for method in preset.methods:
        tune(results, method, [0.2, 0.9, 0.5, 0.1])
    tuned = len(results.runs)
    after = due(results)
    assert {run.seed for run in after} == set(SEEDS)
    assert TUNING_SEED not in SEEDS
    assert tuned + len(after) == planned(results)
    assert {run.traces for run in after if run.method == "on-policy"} == {"perfect", "verbose"}
    assert {run.traces for run in after if run.method == "luffy"} == set(ALL)
    for run in after:
        results.add(run, found(0.7))
    assert due(results) == []
    assert due(Results(preset)) == [], "what is stored is not run again"


def test_the_best_rate_is_the_lowest_of_those_that_cannot_be_told_from_the_highest(preset):
    results = Results(preset)
    tune(results, "sft", [0.2, 0.5, 0.52, 0.1])  # 8 in 256 are one standard error
    assert results.best("sft") == preset.lrs["supervised"][1]
    tune(results, "luffy", [0.2, 0.5, 0.6, 0.1])
    assert results.best("luffy") == preset.lrs["rl"][2]


def test_a_best_rate_at_the_edge_asks_for_another_one(preset):
    results = Results(preset)
    tune(results, "luffy", [0.1, 0.2, 0.3, 0.5])
    assert results.best("luffy") is None
    assert [run.lr for run in results.tuning("luffy")] == [*preset.lrs["rl"], 1e-3]
    assert [run.lr for run in due(results) if run.method == "luffy"] == [1e-3]
    results.add(Run("luffy", "perfect", 1e-3, TUNING_SEED), found(0.9))
    assert [run.lr for run in results.tuning("luffy")][-1] == 3e-3
    results.add(Run("luffy", "perfect", 3e-3, TUNING_SEED), found(0.95))
    assert results.best("luffy") == 3e-3, "six rates are the most"
    tune(results, "on-policy", [0.5, 0.4, 0.3, 0.2])
    assert results.tuning("on-policy")[0].lr == 3e-6


def test_a_stage_before_rl_has_the_rate_that_is_best_for_it(preset):
    results = Results(preset)
    assert not [run for run in due(results) if run.method == "sft-rl"]
    tune(results, "sft", [0.2, 0.3, 0.9, 0.1])
    runs = [run for run in due(results) if run.method == "sft-rl"]
    assert {run.first_lr for run in runs} == {1e-3}
    first, second = preset.stages(preset.methods["sft-rl"], "perfect", 3e-5, 1, 1e-3)
    assert (first["objective.name"], first["optim.lr"], second["optim.lr"]) == ("sft", 1e-3, 3e-5)
    results.add(runs[0], found(0.5))
    assert results.has(runs[0])
    assert not results.has(dataclasses.replace(runs[0], first_lr=3e-4)), "another first stage is another run"


def test_runs_that_began_with_another_model_are_forgotten(preset):
    results = Results(preset)
    results.add(Run("sft", "perfect", 1e-3, 1), found(0.5))
    results.add(Run("sft", "perfect", 1e-3, 2), found(0.5, base="of another processor"))
    assert results.only({1: "taught", 2: "taught"}) == 1
    assert [run["seed"] for run in results.runs.values()] == [1]


def test_runs_of_another_recipe_are_missing(preset, monkeypatch):
    results = Results(preset)
    results.add(Run("sft", "perfect", 1e-3, 1), found(0.5))
    results.add(Run("luffy", "perfect", 1e-4, 1), found(0.5))
    assert len(Results(preset).runs) == 2
    changed = dataclasses.replace(preset.methods["luffy"], options={"objective.name": "luffy", "objective.gamma": 0.2})
    one = dataclasses.replace(preset, methods=preset.methods | {"luffy": changed})
    assert [run["method"] for run in Results(one).runs.values()] == ["sft"]
    assert not Results(dataclasses.replace(preset, steps=51)).runs
    assert recipe(preset, "sft") != recipe(preset, "luffy")
    monkeypatch.setattr(presets, "GUESSED", 0)
    assert not Results(dataclasses.replace(preset)).runs, "another model to begin with"


@pytest.mark.parametrize("name", PRESETS)
def test_every_run_has_a_configuration_and_methods_share_data_and_rows(name, preset, monkeypatch):
    chosen = PRESETS[name]
    for method_name, method in chosen.methods.items():
        for traces in chosen.traces:
            stages = list(chosen.stages(method, traces, 1e-4, 3, 1e-4))
            configs = [load_config("quickstart", [f"--{k}={v}" for k, v in options.items()]) for options in stages]
            assert sum(config.train.steps for config in configs) == chosen.steps
            for config in configs:
                assert config.train.seed == config.data.problems.seed == 3
                rows = config.train.prompts_per_step * getattr(config.objective, "rows", 1)
                assert rows == chosen.prompts * (1 if method_name == "sft-once" else chosen.rows)


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


def test_methods_are_compared_seed_by_seed(preset):
    def runs(*scores: float) -> list[dict]:
        return [found(score) | {"seed": seed} for seed, score in enumerate(scores, 1)]

    theirs = runs(0.4, 0.6, 0.9)
    assert study_report.difference(runs(0.5, 0.7, 1.0), theirs) == "+10.0 \u00b1 0.0"
    assert study_report.difference(runs(0.5, 0.7), theirs) == "-", "some are missing"
    half = 100 * 4.303 * stdev([0.0, 0.1, 0.2]) / 3**0.5
    assert study_report.difference(runs(0.4, 0.7, 1.1), theirs) == f"+10.0 \u00b1 {half:.1f}"


def test_rl_without_traces_has_the_same_figure_whatever_they_are(preset):
    results = Results(preset)
    tune(results, "on-policy", [0.2, 0.5, 0.3, 0.1])
    for seed in SEEDS:
        results.add(Run("on-policy", "perfect", 3e-5, seed), found(0.625))
    [line] = [line for line in study_report.traces_table(results) if line.startswith("| on-policy")]
    assert line.split("|")[2:-1] == [" 62.5 ", " 62.5 ", " 62.5 ", " - "], "but that with verbose ones is run"


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
