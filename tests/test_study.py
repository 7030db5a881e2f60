"""The study's table in the README is what its results say, and they are of today's recipe."""

from bench import study


def test_the_readme_shows_the_stored_results():
    results = study.load()
    have = study.current(results)
    assert set(have) == set(results), "rows of another recipe: python -m bench.study runs them again"
    shown = (study.ROOT / "README.md").read_text().split(study.BEGIN)[1].split(study.END)[0]
    assert shown.strip() == study.table(have).strip()


def test_baselines_get_luffys_steps_or_its_minutes():
    results = {"luffy": {"steps": 40}, "pace": {"luffy": 12.0, "dr_grpo": 8.0, "sft": 3.0}}
    steps = {name: study.steps_of(name, results) for name in study.VARIANTS}
    assert steps["dr_grpo-steps"] == steps["sft-steps"] == steps["luffy-noisy"] == 40
    assert (steps["dr_grpo-time"], steps["sft-time"], steps["sft-noisy"]) == (60, 160, 160)


def test_another_recipe_is_another_digest(monkeypatch):
    before = study.recipe()
    monkeypatch.setitem(study.COMMON, "optim.lr", 1e-6)
    assert study.recipe() != before
