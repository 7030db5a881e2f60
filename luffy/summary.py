"""What a run shows at its end: a before/after table and a picture of the learning curves."""

from pathlib import Path
from typing import Any

from rich.table import Table

from luffy.console import console, print_json, tell
from luffy.files import new_file, read_jsonl
from luffy.run_folder import RunFolder

COLORS = {"rollouts": "tab:blue", "rollout": "tab:blue", "traces": "tab:orange", "trace": "tab:orange"}
SET_NAMES = {"heldout": "held-out problems", "ood": "harder than any in training"}


def print_result(run: RunFolder, as_json: bool = False) -> None:
    """The before/after table of a complete run; or what result.json has. Of a first stage no JSON: one document."""
    result = run.result
    assert result is not None, f"{run.path} is not complete"
    if as_json:
        if run.path.name != "first":
            print_json(result | {"run_folder": str(run.path)})
        return
    table = Table(
        title=f"{result['objective']}: {result['steps']} steps, {result['train_minutes']:.1f} min of training"
    )
    for column, justify in (("problems", "left"), ("n", "right"), ("before", "right"), ("after", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for before, after in zip(result["before"], result["after"], strict=True):
        name = SET_NAMES.get(before["name"], before["name"])
        table.add_row(name, str(before["num_problems"]), _percent(before), _percent(after))
    if result["before"]:
        console.print(table)
    tell(f"run folder: {run.path}   (curves.png, metrics.jsonl, samples/, {result['checkpoint']})")


def draw_curves(run: RunFolder) -> Path:
    """Reward on and off, held-out accuracy, entropy and trace probability over steps, as curves.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    steps = read_jsonl(run.metrics)
    evals = [record for record in run.read_evals() if record["name"] == "heldout"]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True, layout="constrained")
    panels = {
        "Reward": [("rollouts", "on_off_metrics/on_score"), ("traces", "on_off_metrics/off_score")],
        "Held-out accuracy": [],
        "Entropy, nats per token": [("response tokens", "actor/entropy_loss")],
        "Probability of the token": [
            ("trace tokens", "actor/off_policy_prob"),
            ("rollout tokens", "actor/on_policy_prob"),
        ],
    }
    for axis, (title, series) in zip(axes.flat, panels.items(), strict=True):
        for label, key in series:
            points = [(record["step"], record[key]) for record in steps if record.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, linewidth=1.5, color=COLORS.get(label.split()[0]))
        axis.set_title(title, loc="left", fontsize=11)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    held = axes.flat[1]
    if evals:
        x, y = [e["step"] for e in evals], [e["accuracy"] for e in evals]
        low = [e["accuracy"] - e["interval"][0] for e in evals]
        high = [e["interval"][1] - e["accuracy"] for e in evals]
        held.errorbar(x, y, yerr=(low, high), marker="o", capsize=3, linewidth=1.5, label="95 % interval")
    for axis in (axes.flat[0], held, axes.flat[3]):
        axis.set_ylim(-0.03, 1.03)
    axes.flat[2].set_ylim(bottom=0)
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=9)
    for axis in axes[1]:
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    with new_file(run.curves) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
    return run.curves


def _percent(record: dict[str, Any]) -> str:
    low, high = record["interval"]
    return f"{record['accuracy']:.1%} ({low:.0%}-{high:.0%})"
