"""The quickstart study: LUFFY, on-policy RL and SFT on the same problems, whoever wins.

    python -m bench.study [--only NAME ...]    run what is missing, one after the other
    python -m bench.study --table                            print the table from bench/results/quickstart.json
    python -m bench.study --readme                           put that table into README.md

Every variant is `luffy train quickstart` with the options shown below; equal wall-clock means equal minutes of training
(rollouts, verification, update and weight sync; not evaluation). Run it on an otherwise idle machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "quickstart.json"
NOISE = {"data.problems.wrong": 0.3, "data.problems.missing": 0.3}
VARIANTS = {
    "luffy": ("LUFFY", {}),
    "grpo-steps": ("on-policy (Dr.GRPO), equal steps", {"objective.name": "grpo"}),
    "grpo-time": ("on-policy (Dr.GRPO), equal time", {"objective.name": "grpo"}),
    "sft-steps": ("SFT, equal steps", {"objective.name": "sft"}),
    "sft-time": ("SFT, equal time", {"objective.name": "sft"}),
    "luffy-noisy": ("LUFFY, 30 % wrong, 30 % missing traces", NOISE),
    "sft-noisy": ("SFT, the same traces, equal time", {"objective.name": "sft"} | NOISE),
    "sft-noisy-filtered": (
        "SFT, those that verify, equal time",
        {"objective.name": "sft", "objective.trace_filter": True} | NOISE,
    ),
}
BEGIN, END = "<!-- study -->", "<!-- /study -->"


def budget(name: str, results: dict) -> dict[str, object]:
    """LUFFY runs as the recipe says; the others get its steps, or as many steps as fit into its minutes.

    Steps and not minutes end a run: the learning rate falls to 0 at the last step, and every row deserves that.
    """
    if name.startswith("luffy"):
        return {"train.max_minutes": 1000}
    steps, minutes = results["luffy"]["steps"], results["luffy"]["train_minutes"]
    if not name.endswith("-steps"):
        paced = results[f"{name.split('-')[0]}-steps"]
        steps = round(minutes * paced["steps"] / paced["train_minutes"])
    return {"train.steps": steps, "train.max_minutes": 1000}


def run(name: str, results: dict) -> dict:
    label, options = VARIANTS[name]
    options = options | budget(name, results) | {"eval.every": 0, "checkpoint.every": 0}
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--{key}={value}" for key, value in options.items()]
        command = [sys.executable, "-m", "luffy", "train", "quickstart", "--run-dir", f"{folder}/run", *flags]
        subprocess.run(command, check=True, cwd=ROOT)
        result = json.loads(Path(folder, "run", "result.json").read_text())
        environment = json.loads(Path(folder, "run", "environment.json").read_text())
    kept = ("steps", "train_minutes", "response_tokens", "before", "after")
    return {"label": label, "options": options, "environment": environment} | {key: result[key] for key in kept}


def table(results: dict) -> str:
    any_run = next(iter(results.values()))
    machine, sizes = any_run["environment"]["machine"], [e["num_problems"] for e in any_run["after"]]
    lines = [
        f"| | steps | minutes | held-out ({sizes[0]}) | 95 % | harder ({sizes[1]}) |",
        "|---|---:|---:|---:|---:|---:|",
        _row("base model", None, any_run["before"]),
    ]
    lines += [
        _row(results[name]["label"], results[name], results[name]["after"]) for name in VARIANTS if name in results
    ]
    return "\n".join([*lines, "", f"{machine['cpu']}, {machine['cores']} cores, one run each, greedy decoding."])


def _row(label: str, result: dict | None, evaluations: list[dict]) -> str:
    held, harder = evaluations[0], evaluations[1]
    steps, minutes = (str(result["steps"]), f"{result['train_minutes']:.1f}") if result else ("", "")
    low, high = held["interval"]
    return (
        f"| {label} | {steps} | {minutes} | {held['accuracy']:.1%} | {low:.0%}-{high:.0%} | {harder['accuracy']:.1%} |"
    )


def write_readme(text: str) -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants to run")
    parser.add_argument("--again", action="store_true", help="run them even if results are there")
    parser.add_argument("--table", action="store_true", help="print the table and do nothing else")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md and do nothing else")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "luffy" not in results and (args.table or args.readme or "luffy" not in args.only):
        parser.error("the other rows are measured by LUFFY's: run `python -m bench.study --only luffy` first")
    if args.readme:
        write_readme(table(results))
    elif not args.table:
        for name in [name for name in VARIANTS if name in args.only]:  # in order: time rows follow their step rows
            if args.again or name not in results:
                results[name] = run(name, results)
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
