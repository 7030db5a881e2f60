"""Tables and plots of docs/study.md from what `bench.study` has stored. Its text is written by hand, around them."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from bench.report import ROOT, put

if TYPE_CHECKING:
    from bench.study import Results

DOC, CURVES, QUALITY = (
    ROOT / "docs" / "study.md",
    ROOT / "docs" / "study-curves.png",
    ROOT / "docs" / "study-traces.png",
)
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t, two-sided, by the number of seeds."""
BASELINE = "on-policy"
SHOWN = ("on-policy", "sft", "sft-rl", "rl_sft", "luffy", "luffy-linear", "srft", "chord", "hpt")
Runs = list[dict[str, Any]]


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval over seeds; nan of a single one."""
    half = T_95[len(values)] * stdev(values) / len(values) ** 0.5 if len(values) in T_95 else float("nan")
    return fmean(values), half


def scored(runs: Runs, split: str) -> str:
    if not runs:
        return "-"
    return spread([run["after"][split] for run in runs])


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean, half = mean_and_half(values)
    return f"{100 * mean:.1f} \u00b1 {100 * half:.1f}"


def methods_table(results: Results) -> Iterator[str]:
    splits = next(iter(results.runs.values()))["after"]
    yield f"| method | rate | {' | '.join(splits)} | heldout, less on-policy RL's | tokens of an answer |"
    yield "|---|---:" + "|---:" * (len(splits) + 2) + "|"
    models = {run["seed"]: run["before"] for run in results.runs.values() if run["seed"] and run["traces"] == "perfect"}
    before = models.values()
    yield f"| base | | {' | '.join(spread([b[split] for b in before]) for split in splits)} | | |"
    for name, method in results.preset.methods.items():
        if runs := results.of(name, "perfect"):
            said = " | ".join(scored(runs, split) for split in splits)
            tokens = fmean(run["answer_tokens"] for run in runs)
            ahead = "" if name == BASELINE else difference(runs, results.of(BASELINE, "perfect"))
            yield f"| {method.label} | {results.best(name):g} | {said} | {ahead} | {tokens:.0f} |"


def traces_table(results: Results) -> Iterator[str]:
    qualities = list(results.preset.traces)
    yield f"| method | {' | '.join(qualities)} |"
    yield "|---" + "|---:" * len(qualities) + "|"
    for name, method in results.preset.methods.items():
        if method.traces != ("perfect",):
            same = results.of(method.tuned_as or name, "perfect")
            cells = [changed(results.of(name, quality), same) for quality in qualities]
            if name == BASELINE:  # traces that are wrong or missing change nothing for it
                cells = [cell if q in method.traces else cells[0] for q, cell in zip(qualities, cells, strict=True)]
            elif method.tuned_as:  # which it is, with perfect traces
                cells[0] = changed(same, same)
            yield f"| {method.label} | {' | '.join(cells)} |"


def difference(runs: Runs, others: Runs) -> str:
    """Of held-out accuracy, in points, seed by seed: what the model of a seed began with falls out."""
    theirs = {run["seed"]: run["after"]["heldout"] for run in others}
    mine = {run["seed"]: run["after"]["heldout"] for run in runs}
    if mine.keys() != theirs.keys() or not mine:
        return "-"
    mean, half = mean_and_half([mine[seed] - theirs[seed] for seed in mine])
    return f"{100 * mean:+.1f} \u00b1 {100 * half:.1f}"


def changed(runs: Runs, perfect: Runs) -> str:
    """Mean held-out accuracy, and what is gained or lost against perfect traces."""
    if not runs:
        return "-"
    mean = f"{100 * fmean(run['after']['heldout'] for run in runs):.1f}"
    return mean if runs == perfect else f"{mean} ({difference(runs, perfect)})"


def rates_table(results: Results) -> Iterator[str]:
    """Every try of the tuning, so that nobody has to wonder what another rate would have given."""
    yield "| method | held-out accuracy by rate, one seed |"
    yield "|---|---|"
    for name, method in results.preset.methods.items():
        tried = [(run.lr, results.runs.get(run.key)) for run in results.tuning(name)]
        if said := [f"{lr:g}: {run['after']['heldout']:.3f}" for lr, run in tried if run]:
            yield f"| {method.label} | {', '.join(said)} |"


def smoothed(curves: list[list[float | None]]) -> tuple[list[int], list[float]]:
    """Steps, and the mean over runs and the last five steps of what is known."""
    steps, means = [], []
    for at in range(min(map(len, curves))):
        known = [value for curve in curves for value in curve[max(0, at - 4) : at + 1] if value is not None]
        if known:
            steps.append(at + 1)
            means.append(fmean(known))
    return steps, means


def plot_curves(results: Results) -> None:
    pyplot = _pyplot()
    names = ("reward", "entropy", "p(trace)", "answer")
    titles = ("reward of rollouts", "entropy, nats", "probability of a trace's token", "tokens of a rollout")
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    for axis, name, title in zip(axes.flat, names, titles, strict=True):
        for number, method in enumerate(SHOWN):
            curves = [run["curves"][name] for run in results.of(method, "perfect") if name in run["curves"]]
            if curves:
                axis.plot(*smoothed(curves), label=results.preset.methods[method].label, color=f"C{number}")
        axis.set(title=title, xlabel="step", ylim=(0.9 if name == "p(trace)" else 0, None))
        axis.grid(alpha=0.3)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(CURVES, dpi=110)
    pyplot.close(figure)


def plot_traces(results: Results) -> None:
    pyplot = _pyplot()
    qualities = list(results.preset.traces)
    methods = [name for name, method in results.preset.methods.items() if len(method.traces) == len(qualities)]
    figure, axis = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    width = 0.8 / len(methods)
    for number, name in enumerate(methods):
        found = [(at, results.of(name, quality)) for at, quality in enumerate(qualities)]
        points = [(at, fmean(run["after"]["heldout"] for run in runs)) for at, runs in found if runs]
        if points:
            at, mean = zip(*points, strict=True)
            where = [x + (number - len(methods) / 2 + 0.5) * width for x in at]
            axis.bar(where, mean, width, label=results.preset.methods[name].label)
    axis.set(xticks=range(len(qualities)), xticklabels=qualities, ylabel="held-out accuracy", ylim=(0, 1))
    axis.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(QUALITY, dpi=110)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def report(results: Results) -> None:
    """Of the tiny preset into docs/study.md; of another one to the terminal."""
    tables = {"methods": methods_table, "traces": traces_table, "rates": rates_table}
    if not results.runs:
        raise SystemExit("nothing is stored: run `python -m bench.study` first")
    if results.preset.name != "tiny":
        for table in tables.values():
            print("\n".join(table(results)), end="\n\n")
        return
    for name, table in tables.items():
        put(DOC, name, "\n".join(table(results)))
    plot_curves(results)
    plot_traces(results)
