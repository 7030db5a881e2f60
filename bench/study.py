"""Guidance by traces against its baselines, in miniature: the paper's comparison on a laptop, from one command.

    python -m bench.study [--workers N]     run what is missing from bench/results/study.json, then --report
    python -m bench.study --plan            what there is to run, and how long it takes
    python -m bench.study --report          the tables and plots of docs/study.md from what is stored
    python -m bench.study --preset smollm2  a subset, with the quickstart's model and problems

Small models, one for each seed, are first taught skills by `luffy train` itself. Then every method trains them on
problems that they can hardly solve, and is judged by others like them, longer ones, and the skills that it began with.
Four learning rates of each method are tried on one seed, and more where the best is the highest or the lowest; it runs
on three other seeds: other models, problems and held-out problems. The best is the lowest within a standard error of
the highest held-out accuracy. With it the methods that use traces run again where a third of the traces are wrong,
most are missing, or half are long-winded.

Equal compute: the same steps, and as many rows in an update: supervised methods learn from as many traces a step as
others have rollouts and traces, so they see more traces (`sft-once` sees those that LUFFY sees); what they save,
sampling, is not paid out to them. A worker is one process with one core and one vLLM engine for all its runs. What is
stored is kept; a run of another recipe than today's, or of another model than the one at hand, is missing.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.presets import PRESETS, RATES, Preset
from luffy.files import write_json

ROOT = Path(__file__).resolve().parent.parent
TUNING_SEED, SEEDS = 0, (1, 2, 3)
MOST_RATES = 6
CURVES = {
    "reward": "on_off_metrics/on_score",
    "entropy": "actor/entropy_loss",
    "p(trace)": "actor/off_policy_prob",
    "answer": "on_off_metrics/on_response_length_mean",
}


@dataclass(frozen=True, slots=True)
class Run:
    method: str
    traces: str
    """Which quality, of `Preset.traces`."""
    lr: float
    seed: int
    first_lr: float | None = None
    """Of the stage before it, if there is one."""

    @property
    def key(self) -> str:
        return f"{self.method}/{self.traces}/{self.lr:g}/{self.seed}"


class Results:
    """One JSON file: key of a run -> what it gave. Written after each run, whole or not at all."""

    def __init__(self, preset: Preset) -> None:
        self.preset, self.path = preset, preset.results
        stored = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.runs = {key: run for key, run in stored.items() if run["recipe"] == recipe(preset, run["method"])}

    def add(self, run: Run, found: dict[str, Any]) -> None:
        self.runs[run.key] = asdict(run) | {"recipe": recipe(self.preset, run.method)} | found
        write_json(self.path, self.runs)

    def has(self, run: Run) -> bool:
        return run.key in self.runs and self.runs[run.key]["first_lr"] == run.first_lr

    def only(self, bases: dict[int, str]) -> int:
        """Forget runs of other models than these, by seed; how many that were."""
        others = [key for key, run in self.runs.items() if run["base"] != bases[run["seed"]]]
        for key in others:
            del self.runs[key]
        return len(others)

    def of(self, method: str, traces: str, seeds: tuple[int, ...] = SEEDS) -> list[dict[str, Any]]:
        """Runs of the rate that was chosen."""
        lr = self.best(method)
        runs = [self.runs.get(Run(method, traces, lr, seed).key) for seed in seeds] if lr else []
        return [run for run in runs if run]

    def tuning(self, method: str) -> list[Run]:
        """The rates to try, stored or not: more of them, where the best is at an end of those that are stored."""
        rates, first = list(self.preset.rates(method)), self.preset.methods[method].first
        if self.preset.methods[method].tuned_as or (first and not self.best(first)):
            return []
        while len(rates) < MOST_RATES and (best := self._best_of(method, rates)) in (rates[0], rates[-1]):
            at = RATES.index(best)
            rates = [RATES[at - 1], *rates] if best == rates[0] else [*rates, RATES[at + 1]]
        return [Run(method, "perfect", lr, TUNING_SEED, self.first_lr(method)) for lr in rates]

    def first_lr(self, method: str) -> float | None:
        first = self.preset.methods[method].first
        return self.best(first) if first else None

    def best(self, method: str) -> float | None:
        """The learning rate that tuning chose; None before all are tried."""
        method = self.preset.methods[method].tuned_as or method
        return self._best_of(method, [run.lr for run in self.tuning(method)])

    def _best_of(self, method: str, rates: list[float]) -> float | None:
        tried = {lr: self.runs.get(Run(method, "perfect", lr, TUNING_SEED).key) for lr in rates}
        scores = {lr: run["after"]["heldout"] for lr, run in tried.items() if run}
        if not rates or len(scores) < len(rates):
            return None
        top = max(scores.values())
        error = (top * (1 - top) / self.preset.judged) ** 0.5
        return min(lr for lr, score in scores.items() if score >= top - error)


def recipe(preset: Preset, method: str) -> str:
    """Digest of all that a run of this method depends on, but rates, seed, traces, and defaults of the code."""
    chosen = preset.methods[method]
    first = preset.methods[chosen.first].options if chosen.first else None
    said = json.dumps([preset.digest, chosen.options, chosen.kind, first, preset.traces], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def due(results: Results) -> list[Run]:
    """What can be run now: tuning first; a method's other runs once its rate is chosen."""
    preset, found = results.preset, []
    for name in preset.methods:
        found += results.tuning(name)
    for traces in preset.traces:
        for name, method in preset.methods.items():
            if (lr := results.best(name)) and method.runs_with(traces):
                found += [Run(name, traces, lr, seed, results.first_lr(name)) for seed in SEEDS]
    return [run for run in found if not results.has(run)]


def planned(results: Results) -> int:
    """Runs of a whole study, as far as is known: a method may need more rates."""
    preset = results.preset
    others = sum(method.runs_with(traces) for traces in preset.traces for method in preset.methods.values())
    tuned = [name for name, method in preset.methods.items() if not method.tuned_as]
    return sum(len(results.tuning(name) or preset.rates(name)) for name in tuned) + len(SEEDS) * others


class Worker:
    """One process: an engine, and runs one after the other."""

    here: "Worker"

    def __init__(self, preset: Preset) -> None:
        from luffy import distributed
        from luffy.config import MeshConfig, RolloutConfig
        from luffy.rollout.vllm_engine import VllmEngine

        self.preset = preset
        distributed.start(MeshConfig())  # not a run's, so that the engine outlives it
        self.engine = VllmEngine(
            preset.blank(),
            RolloutConfig(),
            dtype="float32",
            eos_token_id=preset.eos_token_id,
            max_model_len=preset.max_model_len,
        )

    def train(self, options: dict[str, Any], folder: Path) -> dict[str, Any]:
        from luffy.config_file import load_config
        from luffy.run_folder import RunFolder
        from luffy.train import train

        return train(
            load_config("quickstart", [f"--{k}={v}" for k, v in options.items()]), RunFolder(folder), False, self.engine
        )

    def run(self, run: Run) -> dict[str, Any]:
        preset, method = self.preset, self.preset.methods[run.method]
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            model, results = preset.base(run.seed), []
            stages = preset.stages(method, run.traces, run.lr, run.seed, run.first_lr)
            for number, options in enumerate(stages):
                at = Path(folder, f"stage-{number}")
                results.append(self.train(options | {"model.name": model}, at))
                model = str(at / results[-1]["checkpoint"])
            steps = [json.loads(line) for line in (at / "metrics.jsonl").read_text().splitlines()]
        before, after = results[0]["before"], results[-1]["after"]
        return {
            "base": weights_digest(preset.base(run.seed)),
            "seconds": round(time.monotonic() - begin, 1),
            "before": scores(before),
            "after": scores(after),
            "answer_tokens": round(after[0]["mean_tokens"], 1),
            "curves": {
                name: [round(value, 4) if isinstance(value := step.get(key), float) else None for step in steps]
                for name, key in CURVES.items()
                if any(isinstance(step.get(key), float) for step in steps)
            },
        }

    def teach(self, seed: int) -> str:
        """The skills that a model begins with, unless they were taught before; the digest of its weights."""
        preset = self.preset
        if not Path(preset.base(seed)).is_dir():
            with tempfile.TemporaryDirectory(dir=preset.folder) as folder:
                result = self.train(preset.skills(seed), Path(folder, "run"))
                Path(folder, "run", result["checkpoint"]).rename(preset.base(seed))
        return weights_digest(preset.base(seed))


def weights_digest(folder: str) -> str:
    """Of a model's weights: a taught model differs between processors, and what follows from it too."""
    found = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def scores(evaluations: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy by problem set: several, or the sources of one."""
    [first, *others] = evaluations
    return {e["name"]: e["accuracy"] for e in evaluations} if others else first["by_source"]


def start_worker(preset: Preset) -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  a hundred runs' progress
    Worker.here = Worker(preset)


def in_worker(run: Run) -> dict[str, Any]:
    return Worker.here.run(run)


def teach_in_worker(seed: int) -> str:
    return Worker.here.teach(seed)


def run_all(preset: Preset, workers: int) -> None:
    """What is missing, as many at a time as there are workers; each is stored when it is done."""
    results, begin = Results(preset), time.monotonic()
    flying: dict[Future[dict[str, Any]], Run] = {}
    os.environ |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers)), "TRITON_INTERPRET": "1"}
    seeds = (TUNING_SEED, *SEEDS)
    for seed in seeds:
        preset.blank(seed)  # before workers look for it
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawned, initializer=start_worker, initargs=(preset,)) as pool:
        bases = dict(zip(seeds, pool.map(teach_in_worker, seeds), strict=True))
        if others := results.only(bases):
            print(f"{others} stored runs began with other models than those at hand: they run again", flush=True)
        while True:
            waiting = [run for run in due(results) if run not in flying.values()]
            for run in waiting[: workers - len(flying)]:
                flying[pool.submit(in_worker, run)] = run
            if not flying:
                break
            done: set[Future[dict[str, Any]]] = wait(flying, return_when=FIRST_COMPLETED).done
            for future in done:
                run, found = flying.pop(future), future.result()
                results.add(run, found)
                minutes = (time.monotonic() - begin) / 60
                scores = " ".join(f"{name} {value:.3f}" for name, value in found["after"].items())
                at = f"{len(results.runs)}/{planned(results)}"
                print(f"{at} {run.key}: {scores}, {found['seconds']} s; {minutes:.0f} min", flush=True)


def say_plan(preset: Preset) -> None:
    results = Results(preset)
    seconds = [run["seconds"] for run in results.runs.values()]
    print(f"{preset.name}: {planned(results)} runs, {len(seconds)} stored", end="")
    print(f", {sum(seconds) / 60:.0f} core-minutes, {max(seconds):.0f} s the longest" if seconds else "")
    for name, method in preset.methods.items():
        where = [traces for traces in preset.traces if method.runs_with(traces)]
        rates = [run.lr for run in results.tuning(name)] or preset.rates(name)
        tuned = f"that of {method.tuned_as}" if method.tuned_as else ", ".join(f"{lr:g}" for lr in rates)
        print(f"  {name:14} {method.label}; rates {tuned}; {', '.join(where)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, each with one engine")
    parser.add_argument("--plan", action="store_true", help="say what there is to run and do nothing else")
    parser.add_argument("--report", action="store_true", help="write docs/study.md and do nothing else")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    if args.plan:
        return say_plan(preset)
    if not args.report:
        run_all(preset, args.workers)
    from bench.study_report import report

    report(Results(preset))


if __name__ == "__main__":
    main()
