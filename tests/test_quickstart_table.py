"""The quickstart table in the README is what its results say, and they are of today's recipe."""

from bench import quickstart


def shown_in(page: str, marker: str) -> str:
    """What stands between the markers of a page."""
    text = (quickstart.ROOT / page).read_text()
    return text.split(f"<!-- {marker} -->")[1].split(f"<!-- /{marker} -->")[0].strip()


def test_the_readme_shows_the_stored_results():
    results = quickstart.load()
    have = quickstart.current(results)
    assert set(have) == set(results), "rows of another recipe: python -m bench.quickstart runs them again"
    assert set(have) == {"pace", *quickstart.VARIANTS, *quickstart.TRACES}, (
        "python -m bench.quickstart runs what is missing"
    )
    assert shown_in("README.md", "study") == quickstart.table(have).strip()


def test_baselines_get_luffys_steps_or_its_minutes():
    results = {"luffy": {"steps": 40}, "pace": {"luffy": 12.0, "dr_grpo": 8.0, "sft": 3.0}}
    steps = {name: quickstart.steps_of(name, results) for name in quickstart.VARIANTS}
    assert steps["dr_grpo-steps"] == steps["sft-steps"] == steps["luffy-noisy"] == 40
    assert (steps["dr_grpo-time"], steps["sft-time"], steps["sft-noisy"]) == (60, 160, 160)


def test_another_recipe_is_another_digest(monkeypatch):
    before = quickstart.recipe()
    monkeypatch.setitem(quickstart.COMMON, "optim.lr", 1e-6)
    assert quickstart.recipe() != before


def test_the_study_shows_one_two_and_four_traces():
    assert shown_in("docs/study.md", "several") == quickstart.traces_table(quickstart.load()).strip()
    tokens = [quickstart.load()[name]["response_tokens"] for name in quickstart.TRACES]
    assert max(tokens) <= 1.1 * min(tokens)
