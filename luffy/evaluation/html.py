"""The report of an evaluation: one HTML file that needs no network, and tables for a paper."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from luffy.evaluation.mathml import answer, formula_style, typeset
from luffy.evaluation.published import Published, beside, published_name
from luffy.evaluation.scores import Graded, Scores, average, compare
from luffy.files import write_text

PROBLEMS, CHARACTERS, SAID = 200, 6000, 300
"""Shown: problems of a benchmark, characters of a question or response, and of what it ends up saying."""


@dataclass(slots=True)
class Evaluated:
    """A model's part of a report."""

    model: str
    scores: list[Scores]
    graded: dict[str, list[Graded]]
    """By benchmark."""


def write_report(path: Path, models: Sequence[Evaluated], settings: dict[str, Any], warnings: Sequence[str]) -> None:
    """`path`, and beside it the same tables as Markdown and LaTeX.

    settings: how answers were sampled. warnings: what makes numbers doubtful, shown first.
    """
    import jinja2

    names = titles(models[0].scores)
    sizes = {one.benchmark: one.questions for one in models[0].scores}
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    text = page.from_string((files("luffy.evaluation") / "report.html").read_text(encoding="utf-8")).render(
        title=", ".join(model.model for model in models),
        settings=settings,
        warnings=warnings,
        benchmarks=list(names),
        names=names,
        ours=[row(model) for model in models],
        published=[theirs(one, sizes) for one in beside(sizes)],
        differences=differences(models),
        scores=[(model.model, one) for model in models for one in model.scores],
        problems=[
            problem(model.model, name, item) for model in models for name in names for item in shown(model, name)
        ],
        others=list(dict.fromkeys(name for model in models for one in model.scores for name in one.disagree)),
        limits={"problems": PROBLEMS},
        markdown=markdown(models),
        latex=latex(models),
        sorting=sorting(),
        formulas=formula_style(),
    )
    write_text(path, text)
    write_text(path.with_suffix(".md"), markdown(models))
    write_text(path.with_suffix(".tex"), latex(models))


def sorting() -> str:
    """The script by which a page's tables are sorted."""
    return (files("luffy.evaluation") / "sorting.js").read_text(encoding="utf-8")


def row(model: Evaluated) -> dict[str, Any]:
    mean = average(model.scores)
    cells = [(one.accuracy, one.interval) for one in model.scores]
    graders = ", ".join(dict.fromkeys(one.grader for one in model.scores))
    return {"model": model.model, "grader": graders, "cells": cells, "average": (mean.accuracy, mean.interval)}


def theirs(one: Published, sizes: dict[str, int]) -> dict[str, Any]:
    """With an average of our own making, over the benchmarks that are compared: None where one of them is missing."""
    cells = [one.percent.get(published_name(*benchmark) or "") for benchmark in sizes.items()]
    known = [cell for cell in cells if cell is not None]
    return {
        "method": one.method,
        "base": one.base_model,
        "source": one.source,
        "grader": one.grader,
        "note": one.note,
        "cells": cells,
        "average": sum(known) / len(known) if len(known) == len(cells) else None,
    }


def differences(models: Sequence[Evaluated]) -> list[tuple[str, str, tuple[float, float, float, float]]]:
    """(model, benchmark, difference to the first model)"""
    first = models[0]
    return [
        (model.model, name, found)
        for model in models[1:]
        for name, found in compare(model.scores, first.scores).items()
    ]


def shown(model: Evaluated, name: str) -> list[Graded]:
    return model.graded[name][:PROBLEMS]


def problem(model: str, benchmark: str, item: Graded) -> dict[str, Any]:
    """A right and a wrong response where there are both."""
    order = sorted(range(len(item.answers)), key=lambda at: (item.right[at], at))
    chosen = sorted({order[0], order[-1]})
    return {
        "model": model,
        "benchmark": benchmark,
        "id": item.question.id,
        "question": typeset(shortened(item.question.text)),
        "gold": answer(
            item.question.answer if isinstance(item.question.answer, str) else " | ".join(item.question.answer)
        ),
        "accuracy": item.accuracy,
        "answers": len(item.answers),
        "responses": [response(item, at) for at in chosen],
    }


def response(item: Graded, at: int) -> dict[str, Any]:
    given, verdict = item.answers[at], item.verdicts[at]
    what = "right" if verdict.reward >= 1 else "wrong" if verdict.status == "ok" else verdict.status
    others = {name: verdicts[at].reward >= 1 for name, verdicts in item.others.items()}
    marks = {"what": what, "tokens": given.tokens, "finished": given.finished, "others": others}
    return {"text": typeset(shortened(given.text)), "said": answer(shortened(item.said[at], SAID))} | marks


def shortened(text: str, most: int = CHARACTERS) -> str:
    """Without its middle where it is longer."""
    more = len(text) - most
    return text if more <= 0 else f"{text[: most // 3]}\n[... {more:,} characters ...]\n{text[-2 * most // 3 :]}"


def markdown(models: Sequence[Evaluated]) -> str:
    names = [_cell(name) for name in titles(models[0].scores).values()]
    lines = [f"| model | {' | '.join(names)} | average |", "|---|" + "---:|" * (len(names) + 1)]
    for model in models:
        cells = [f"{100 * one.accuracy:.1f} ({_span(one.interval)})" for one in model.scores]
        mean = average(model.scores)
        lines.append(
            f"| {_cell(model.model)} | {' | '.join(cells)} | {100 * mean.accuracy:.1f} ({_span(mean.interval)}) |"
        )
    lines += ["", f"In parentheses 95 % intervals over problems. {graded_by(models)}"]
    return "\n".join(lines) + "\n"


def latex(models: Sequence[Evaluated]) -> str:
    names = titles(models[0].scores).values()
    lines = [rf"\begin{{tabular}}{{l{'c' * (len(names) + 1)}}}", r"\hline"]
    lines += [" & ".join(["model", *map(_tex, names), "average"]) + r" \\", r"\hline"]
    for model in models:
        mean = average(model.scores)
        pairs = [*((one.accuracy, one.interval) for one in model.scores), (mean.accuracy, mean.interval)]
        cells = [rf"${100 * accuracy:.1f}_{{{_span(interval)}}}$" for accuracy, interval in pairs]
        lines.append(" & ".join([_tex(model.model), *cells]) + r" \\")
    lines += [r"\hline", r"\end{tabular}", f"% Subscripts: 95 % intervals over problems. {graded_by(models)}"]
    return "\n".join(lines) + "\n"


def graded_by(models: Sequence[Evaluated]) -> str:
    found = dict.fromkeys((one.benchmark, one.grader, one.answers // one.questions) for m in models for one in m.scores)
    return "Graders, answers to a problem: " + "; ".join(f"{name} {grader}, {n}" for name, grader, n in found) + "."


def titles(every: Sequence[Scores]) -> dict[str, str]:
    """By benchmark: the papers' name, unless two would have the same."""
    found = {one.benchmark: published_name(one.benchmark, one.questions) for one in every}
    times = Counter(found.values())
    return {benchmark: name if name and times[name] == 1 else benchmark for benchmark, name in found.items()}


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _span(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f}-{100 * interval[1]:.1f}"


def _tex(text: str) -> str:
    return "".join(
        f"\\{mark}" if mark in "&%$#_{}" else {"\\": r"\textbackslash{}", "~": r"\~{}", "^": r"\^{}"}.get(mark, mark)
        for mark in text
    )
