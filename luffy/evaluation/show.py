"""Scores on a terminal."""

from collections.abc import Sequence

from rich.table import Table

from luffy.console import console, tell
from luffy.evaluation.scores import Scores, average, compare


def print_scores(model: str, every: Sequence[Scores]) -> None:
    ks = list(every[0].pass_at)
    voted = any(one.majority is not None for one in every)
    table = Table(title=model)
    table.add_column("benchmark")
    for column in (
        "problems",
        "answers",
        "accuracy",
        "95 %",
        *(f"pass@{k}" for k in ks),
        *(["maj@n"] if voted else []),
    ):
        table.add_column(column, justify="right")
    for one in every:
        cells = [f"{one.questions:,}", f"{one.answers:,}", f"{one.accuracy:.1%}", _span(one.interval)]
        cells += [f"{one.pass_at[k]:.1%}" for k in ks]
        cells += ["" if one.majority is None else f"{one.majority:.1%}"] if voted else []
        table.add_row(one.benchmark, *cells)
    if len(every) > 1:
        mean = average(every)
        table.add_row("average", "", "", f"{mean.accuracy:.1%}", _span(mean.interval), style="bold")
    console.print(table)
    for one in every:
        other = "".join(f", `{name}` says otherwise of {share:.1%}" for name, share in one.disagree.items())
        none = "" if one.no_answer is None else f"no answer {one.no_answer:.1%}, "
        tell(
            f"{one.benchmark}: {one.mean_tokens:.0f} tokens an answer, cut off {one.truncated:.1%}, {none}timeouts "
            f"{one.timeouts}, crashes {one.crashes}; graded by {one.grader}{other}"
        )


def print_comparison(first: str, other: str, theirs: Sequence[Scores], ours: Sequence[Scores]) -> None:
    for name, (mean, low, high, p) in compare(ours, theirs).items():
        span = f"95 % {100 * low:+.1f} to {100 * high:+.1f}"
        tell(f"{name}: {other} - {first}: {100 * mean:+.1f} points, {span}, p = {p:.2g}")


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.1%}-{interval[1]:.1%}"
