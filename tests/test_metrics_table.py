"""docs/metrics.md has every number that the code logs, and no other."""

import re
from pathlib import Path

from luffy.reporting.charts import CHARTS

ROOT = Path(__file__).resolve().parents[1]
ROWS = re.findall(r"^\| (\**)`([^`]+)`\** \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
SECTIONS = "batch|on_off_metrics|critic|reward_model|response_length|prompt_length|verify|traces|replay|actor|rollout"
KEY = re.compile(rf'"((?:{SECTIONS}|log|timing_s|timing_per_token_ms|perf)/[^" ]+)"|"(trainer/idle_s)"')


def spelled_out(name: str) -> list[str]:
    """critic/score/{mean,max,min} is three names."""
    found = re.search(r"\{([^}]+,[^}]+)\}", name)
    return [name] if found is None else [name.replace(found.group(), one) for one in found.group(1).split(",")]


DOCUMENTED = {one for _, name in ROWS for one in spelled_out(name)}


def logged_by_the_source() -> set[str]:
    """Literal keys, with what stands in braces as it is written; reporting only reads."""
    files = [path for path in (ROOT / "luffy").rglob("*.py") if "reporting" not in path.parts]
    return {key for path in files for pair in KEY.findall(path.read_text()) for key in pair if key}


def matches(key: str, name: str) -> bool:
    return bool(re.fullmatch(re.sub(r"\\\{[^}]*\\\}", "[^/]+", re.escape(name)), key))


def is_documented(key: str) -> bool:
    return any(matches(key, name) for name in DOCUMENTED)


def test_what_the_source_logs_is_in_the_table():
    assert len(DOCUMENTED) > 80
    missing = {key for key in logged_by_the_source() if "{" not in key and not is_documented(key)}
    spreads = {"critic/score", "critic/rewards", "critic/returns", "critic/advantages"}  # by `_spread`
    assert missing == spreads


def test_what_is_in_the_table_is_logged():
    source = logged_by_the_source()
    text = "".join(path.read_text() for path in (ROOT / "luffy").rglob("*.py") if "reporting" not in path.parts)
    for name in DOCUMENTED - {"step"}:
        stem, _, last = name.rpartition("/")
        direct = any(matches(name, re.sub(r"\{[^}]*\}", "{x}", key)) or matches(key, name) for key in source)
        spread = last in ("mean", "max", "min") and f'_spread("{stem}"' in text
        network = last in ("grad_norm", "lr") and f'self.step("{stem}/' in text
        counted = f'"{last}"' in text and stem == "rollout"
        assert direct or spread or network or counted, name


def test_what_a_report_draws_is_bold_in_the_table_and_nothing_else_is():
    bold = {one for mark, name in ROWS if mark for one in spelled_out(name)}
    assert bold == {key for chart in CHARTS for _, key in chart.lines}
