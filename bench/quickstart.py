"""The quickstart, compared: LUFFY, on-policy RL and SFT on the same problems, whoever wins.

    python -m bench.quickstart --pace              seconds a step of each objective, interleaved, on an idle machine
    python -m bench.quickstart [--only NAME ...]   run what is missing, one after the other
    python -m bench.quickstart --table             print the table from bench/results/quickstart.json
    python -m bench.quickstart --readme            put that table into README.md, and one of 1, 2 and 4 traces into
                                                   docs/study.md

Every variant is `luffy train quickstart` with the options shown below. A machine that others share is slower at one
minute than at the next, so equal wall-clock is not measured run by run: the pace is (medians of interleaved runs), and
a row has as many steps as LUFFY's minutes hold at that pace. What ends a run is always its steps, because the learning
rate falls to 0 at the last one; so the accuracies do not depend on how busy the machine was, and rows may run side by
side. The pace is that of a run's first steps, where on-policy groups are all wrong and cost no update: on-policy RL
gets more steps than its share. Rows of another recipe than today's count as missing.
"""

import argparse
import fcntl
import hashlib
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from bench.report import put
from luffy.config_file import load_config
from luffy.data import load_problems
from luffy.files import write_json
from luffy.sources import evaluation_sources

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "quickstart.json"
OBJECTIVES = ("luffy", "dr_grpo", "sft")
NOISE = {"data.problems.wrong": 0.3, "data.problems.missing": 0.3}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "luffy": ("LUFFY", {}),
    "dr_grpo-steps": ("on-policy (Dr.GRPO), equal steps", {}),
    "dr_grpo-time": ("on-policy (Dr.GRPO), equal time", {}),
    "sft-steps": ("SFT, equal steps", {}),
    "sft-time": ("SFT, equal time", {}),
    "luffy-noisy": ("LUFFY, 30 % wrong, 30 % missing traces", NOISE),
    "sft-noisy": ("SFT, the same traces, equal time", NOISE),
    "sft-noisy-filtered": ("SFT, those that verify, equal time", NOISE | {"objective.trace_filter": True}),
}
STYLES = ["terse", "lines", "numbered", "arrows"]
# Of eight rows each, so that the tokens of an update are the same
SEVERAL = {
    "objective.rows": 8,
    "objective.trace_choice": "random",
    "train.prompts_per_step": 4,
    "data.problems.teachers": json.dumps(STYLES),
    "data.problems.traces": len(STYLES),
}
TRACES: dict[str, tuple[str, dict[str, Any]]] = {
    f"luffy-traces-{n}": (f"{n} of {len(STYLES)} traces in a group of 8", SEVERAL | {"objective.traces": n})
    for n in (1, 2, 4)
}
# Steps and not minutes end a run; looking and saving meanwhile change nothing.
COMMON = {"train.max_minutes": 1000, "eval.every": 0, "checkpoint.every": 0}


def train(options: dict[str, Any]) -> tuple[dict, list[dict], dict]:
    """Run the quickstart with these options; (result, metrics of its steps, environment)."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        flags = [f"--{key}={value}" for key, value in options.items()]
        command = [sys.executable, "-m", "luffy", "train", "quickstart", "--run-dir", run, *flags]
        subprocess.run(command, check=True, cwd=ROOT)
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return json.loads((run / "result.json").read_text()), steps, json.loads((run / "environment.json").read_text())


def measure_pace(rounds: int = 2, steps: int = 5) -> dict[str, float]:
    """Median seconds a step, by objective. The objectives take turns; a run's first two steps are left out."""
    seconds: dict[str, list[float]] = {objective: [] for objective in OBJECTIVES}
    for _ in range(rounds):
        for objective in OBJECTIVES:
            _, metrics, _ = train(COMMON | {"objective.name": objective, "train.steps": steps, "eval.limit": 1})
            seconds[objective] += [record["timing_s/step"] for record in metrics[2:]]
    return {objective: round(median(values), 2) for objective, values in seconds.items()}


def recipe() -> str:
    """Digest of what the quickstart recipe sets, without what `COMMON` overrides: an option that is new and left at its
    default makes no other recipe."""
    config = load_config("quickstart", [f"--{key}={value}" for key, value in COMMON.items()])
    said = json.dumps(config.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def current(results: dict) -> dict:
    """The rows of today's recipe, and the pace."""
    return {name: row for name, row in results.items() if name == "pace" or row.get("recipe") == recipe()}


def objective_of(name: str) -> str:
    return name.split("-")[0]


def steps_of(name: str, results: dict) -> int:
    steps, pace = results["luffy"]["steps"], results["pace"]
    if name.endswith("-steps") or objective_of(name) == "luffy":
        return steps
    return round(steps * pace["luffy"] / pace[objective_of(name)])


def run(name: str, results: dict) -> dict:
    label, options = (VARIANTS | TRACES)[name]
    options = options | {"objective.name": objective_of(name)}
    if name != "luffy":  # which is as long as the recipe says
        options |= {"train.steps": steps_of(name, results)}
    result, steps, environment = train(options | COMMON)
    kept = {key: result[key] for key in ("steps", "response_tokens", "before", "after")}
    about = {"recipe": recipe(), "label": label, "options": options, "environment": environment}
    return about | {"seconds_per_step": round(median(r["timing_s/step"] for r in steps), 2)} | kept


def load() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


@contextmanager
def stored() -> Iterator[dict]:
    """The results, to change; other processes wait."""
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = load()
        yield results
        write_json(RESULTS, results)


def table(results: dict) -> str:
    any_run = results["luffy"]
    machine, sizes = any_run["environment"]["machine"], [e["num_problems"] for e in any_run["after"]]
    lines = [
        f"| | steps | minutes | held-out ({sizes[0]}) | 95 % | harder ({sizes[1]}) |",
        "|---|---:|---:|---:|---:|---:|",
        f"| the most frequent answer, always | | | {' | | '.join(f'{share:.1%}' for share in constant_answers())} |",
        _row("base model", "", "", any_run["before"]),
    ]
    for name in (name for name in VARIANTS if name in results):
        steps = results[name]["steps"]
        minutes = steps * results["pace"][objective_of(name)] / 60
        lines.append(_row(results[name]["label"], str(steps), f"{minutes:.1f}", results[name]["after"]))
    pace = ", ".join(f"{objective} {seconds:.1f} s" for objective, seconds in results["pace"].items())
    note = f"{machine['cpu']}, {machine['cores']} cores, one run each, greedy decoding. Median time of a step: {pace}."
    return "\n".join([*lines, "", note])


def traces_table(results: dict) -> str:
    lines = ["| LUFFY with | response tokens | held-out | 95 % | harder |", "|---|---:|---:|---:|---:|"]
    for name in (name for name in TRACES if name in results):
        row = results[name]
        said = _row("", "", "", row["after"]).split("|", 4)[-1]
        lines.append(f"| {row['label']} | {row['response_tokens']:,} |{said}")
    return "\n".join(lines)


def constant_answers() -> list[float]:
    """What the best constant answer would score, on each problem set."""
    shares = []
    for source in evaluation_sources(load_config("quickstart")).values():
        answers = Counter(problem.answer for problem in load_problems(source))
        shares.append(answers.most_common(1)[0][1] / answers.total())
    return shares


def _row(label: str, steps: str, minutes: str, evaluations: list[dict]) -> str:
    held, harder = evaluations[0], evaluations[1]
    low, high = held["interval"]
    return (
        f"| {label} | {steps} | {minutes} | {held['accuracy']:.1%} | {low:.0%}-{high:.0%} | {harder['accuracy']:.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS | TRACES, default=list(VARIANTS | TRACES), help="variants to run"
    )
    parser.add_argument("--again", action="store_true", help="run them even if results are there")
    parser.add_argument("--pace", action="store_true", help="measure seconds a step and do nothing else")
    parser.add_argument("--table", action="store_true", help="print the table and do nothing else")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md and do nothing else")
    args = parser.parse_args()
    if args.pace:
        pace = measure_pace()
        with stored() as results:
            results["pace"] = pace
        print(pace)
        return
    if not (args.table or args.readme):
        for name in [name for name in VARIANTS | TRACES if name in args.only]:
            have = current(load())
            if name in have and not args.again:
                continue
            if name != "luffy" and not {"luffy", "pace"} <= have.keys():
                parser.error("other rows are measured by LUFFY's: run `--pace` and `--only luffy` first")
            done = run(name, have)
            with stored() as results:
                results[name] = done
    have = current(load())
    if not {"luffy", "pace"} <= have.keys():
        parser.error("no table yet: run `--pace` and `--only luffy` first")
    text = table(have)
    if args.readme:
        put(ROOT / "README.md", "study", text)
        put(ROOT / "docs" / "study.md", "several", traces_table(have))
    print(text, traces_table(have), sep="\n\n")


if __name__ == "__main__":
    main()
