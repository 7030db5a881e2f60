"""`luffy train --dry-run`: what a run would be, from its real data on, as one record. Nothing is trained or written.

Problems are read, tokenised and refused by the code of a run; lengths and counts are theirs. Caches are filled as a run
would fill them: the embedded model, generated problems, what the hub is asked for. No weights are loaded, and no
engine. What nothing can know before, the length of rollouts, is assumed to be half of the longest.
"""

import errno
import math
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from luffy import plan as planning
from luffy import rank, stages, step_time
from luffy.checks import check_model
from luffy.config import Config
from luffy.config_file import load_stages
from luffy.data import Example, Stream
from luffy.errors import UserError, user_errors
from luffy.files import disk_errors, read_jsonl
from luffy.load import read_config
from luffy.loggers import started as loggers
from luffy.loggers.sink import without_secrets
from luffy.machines import Machine, find_machine
from luffy.objectives import Objective
from luffy.plan import Asked, Plan
from luffy.rates import machine_here
from luffy.recipe_book import differences, spelled_out
from luffy.rewards import VerifierPool
from luffy.run_folder import RunFolder
from luffy.shapes import find_shape
from luffy.sources import Sets, load_sets, load_template, resolve

BESIDE = (0.05, 1.0)
"""Seconds of a step that no work accounts for: packing, verification, Python. Assumed: with a model of a few thousand
weights, whose work takes milliseconds, steps took 0.08 s."""
SLOW_START = 2
"""First steps that a measured pace leaves out: they compile, and fill caches."""


def plan(
    source: str, overrides: list[str], whole: RunFolder, resume: bool, ranks: int | None, gpu: str | None
) -> dict[str, Any]:
    """As JSON values; seconds, bytes, tokens.

    Args:
        whole: folder of the run.
        ranks: to plan for; None: those of this job, else one.
        gpu: a machine of `luffy.machines`, or cpu; None: the one at hand.

    Raises:
        UserError: what `luffy train` would say, in the same words, and a machine that is not known.
    """
    configs = load_stages(source, overrides)
    if gpu is not None:
        find_machine(gpu)  # a stage whose costs are unknown would not look it up
    stages.due(whole, configs, resume)  # refuses what a run would; lets the second begin where the first has ended
    folders = [whole.first, whole] if len(configs) == 2 else [whole]
    size = ranks or rank.world_size()
    found = [_stage(config, folder, resume, size, gpu) for config, folder in zip(configs, folders, strict=True)]
    return {
        "recipe": source,
        "run_folder": str(whole.path),
        "changed": _changed(source, overrides),
        "ranks": size,
        "stages": found,
    }


def _changed(source: str, overrides: list[str]) -> list[dict[str, Any]]:
    """Keys that were given, with what the recipe has; null where it has none. Without secrets: plans are shown."""
    pairs = without_secrets(list(differences(spelled_out(source), spelled_out(source, overrides))))
    return [{"key": key, "recipe": before, "given": now} for key, before, now in pairs]


def _stage(config: Config, run: RunFolder, resume: bool, size: int, gpu: str | None) -> dict[str, Any]:
    run.check(config, resume)
    run.refuse_other_process()
    _refuse_unwritable(run.path)
    loggers.check(config.log)
    path = resolve(config.model)
    template = load_template(path, config.model)
    sets = load_sets(config, template)
    examples = sets.training.examples
    with user_errors("train"):
        stream = Stream(len(examples), config.train.prompts_per_step, config.train.seed)
        VerifierPool(config.reward.grader, config.reward.workers, config.reward.timeout_s).close()
    objective, _ = check_model(config, read_config(path, config.model), examples)
    step, state = _step(config, objective, examples), _state(run, config)
    evaluation = _evaluation(config, sets)
    return {
        "objective": config.objective.name,
        "model": config.model.name,
        "state": state,
        "data": _data(config, sets),
        "step": step,
        "steps": config.train.steps,
        "epochs": config.train.steps * config.train.prompts_per_step / stream.per_epoch,
        "max_minutes": config.train.max_minutes,
        "checkpoint_every": config.checkpoint.every,
        "evaluation": evaluation,
        **_costs(config, path, size, gpu, step, evaluation, state, run),
    }


def _refuse_unwritable(folder: Path) -> None:
    """As a run does that opens it. A folder that is not there is made, which alone tells, and taken away again."""
    with disk_errors("train: cannot open the run folder"):
        if folder.is_dir():
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder / ".lock"))
            return
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True)
        with suppress(OSError):  # somebody may use it by now
            for path in missing:
                path.rmdir()


def _state(run: RunFolder, config: Config) -> dict[str, Any]:
    """new, begun or complete, and where `--resume` would go on."""
    if not run.holds_a_run:
        return {"state": "new", "steps_done": 0, "seconds_done": 0.0, "checkpoint": None}
    from luffy.checkpoint import latest, load_loop, step_of

    newest = latest(run.checkpoints)
    done = 0 if newest is None else step_of(newest)
    seconds = 0.0 if newest is None else load_loop(newest)["train_seconds"]
    state = "complete" if run.is_complete(config) else "begun"
    name = None if newest is None else newest.name
    return {"state": state, "steps_done": done, "seconds_done": seconds, "checkpoint": name}


def _data(config: Config, sets: Sets) -> dict[str, Any]:
    report, examples = sets.training.report, sets.training.examples
    traces = [len(trace) for example in examples for trace in example.traces]
    return {
        "source": config.data.path or "generated",
        "read": report.problems,
        "kept": report.kept,
        "with_trace": report.kept - report.on_policy_only,
        "report": str(report),
        "prompt_tokens": _lengths([len(example.prompt_ids) for example in examples]),
        "trace_tokens": _lengths(traces),
        "notes": sets.notes,
    }


def _lengths(lengths: list[int]) -> dict[str, float] | None:
    if not lengths:
        return None
    return {"least": min(lengths), "mean": fmean(lengths), "median": median(lengths), "most": max(lengths)}


def _step(config: Config, objective: Objective, examples: list[Example]) -> dict[str, Any]:
    """Groups, rows and packed tokens: means over all examples, and what none can exceed."""
    longest, prompts = config.rollout.max_tokens, config.train.prompts_per_step
    assumed = max(1, longest // 2)
    rollouts, traces, trace_tokens, most = [], [], [], 0
    for example in examples:
        may = [len(example.traces[at]) for at in objective.may_choose(example)]
        shown = min(len(may), objective.options.shown)
        rollouts.append(objective.rollouts(shown))
        traces.append(shown)
        trace_tokens.append(shown * fmean(may) if may else 0.0)
        most = max(most, len(example.prompt_ids) + rollouts[-1] * longest + sum(sorted(may)[-shown:] if shown else []))
    prompt = fmean(len(example.prompt_ids) for example in examples)
    rows = fmean(rollouts) + fmean(traces) or 1
    tokens = prompts * (prompt + fmean(rollouts) * assumed + fmean(trace_tokens))
    return {
        "groups": prompts,
        "rollouts": prompts * fmean(rollouts),
        "traces": prompts * fmean(traces),
        "assumed_rollout_tokens": assumed,
        "longest_rollout_tokens": longest,
        "tokens": round(tokens),
        "most_tokens": prompts * most,
        "updates": config.train.updates_per_step,
        "tokens_per_micro": config.train.tokens_per_micro,
        "mean_prompt_tokens": prompt,
        "mean_answer_tokens": (fmean(rollouts) * assumed + fmean(trace_tokens)) / rows,
        "longest_prompt_tokens": max(len(example.prompt_ids) for example in examples),
        "longest_trace_tokens": max((len(trace) for example in examples for trace in example.traces), default=0),
    }


def _evaluation(config: Config, sets: Sets) -> dict[str, Any]:
    """Problems of each set, and how many are asked in the whole run."""
    limit, every = config.eval.limit, config.eval.every
    judged = {name: len(examples[:limit]) for name, examples in sets.heldout.items()}
    during = {"validation": sets.validation} if sets.validation else sets.heldout
    first = len(next(iter(during.values()), [])[: config.eval.every_limit])
    times = (config.train.steps - (not sets.validation)) // every if every else 0
    return {
        "sets": judged,
        "during": {"problems": first, "every": every, "times": times if first else 0},
        "max_tokens": config.eval.max_tokens or config.rollout.max_tokens,
        "answers": 2 * sum(judged.values()) + times * first,
    }


def _costs(
    config: Config,
    path: str,
    size: int,
    gpu: str | None,
    step: dict[str, Any],
    evaluation: dict[str, Any],
    state: dict[str, Any],
    run: RunFolder,
) -> dict[str, Any]:
    """Memory by part and seconds, or why they cannot be told."""
    measured = _measured(run)
    found: dict[str, Any] = {"machine": None, "memory": None, "seconds": None, "measured_step": measured, "unknown": ""}
    try:
        machine, rates = (find_machine(gpu), _rates(gpu)) if gpu else machine_here(config.model.dtype)
        if machine.name == "cpu":
            machine = replace(machine, flops=machine.flops / size, bandwidth=machine.bandwidth / size)
        asked = _asked(config, path, machine, size, step)
        given = planning.evaluate(asked, planning.configured(asked))
    except UserError as error:
        return found | {"unknown": str(error)}
    found["machine"] = {"name": machine.name, "memory": machine.memory, "rates": rates}
    found["memory"] = {
        "parts": given.parts,
        "needed": given.needed,
        "available": given.memory,
        "fits": given.fits,
        "problem": given.problem,
        "peak": given.moment,
    }
    return found | {"seconds": _seconds(config, given, evaluation, state, measured)}


def _rates(gpu: str) -> str:
    return "no rates are known" if gpu.lower() == "cpu" else f"rates from the data sheet of {gpu.lower()}"


def _asked(config: Config, path: str, machine: Machine, size: int, step: dict[str, Any]) -> Asked:
    """With the lengths that the data have in place of those that the configuration allows."""
    shape = find_shape(path if Path(path).is_dir() else config.model.name)
    prompt, answer = step["longest_prompt_tokens"], max(step["longest_rollout_tokens"], step["longest_trace_tokens"])
    return replace(
        planning.ask(config, shape, machine, size, context=prompt + answer),
        prompt=prompt,
        answer=answer,
        sampled=step["longest_rollout_tokens"],
        mean=max(1, round(step["mean_answer_tokens"])),
        mean_prompt=max(1, round(step["mean_prompt_tokens"])),
    )


def _seconds(
    config: Config, given: Plan, evaluation: dict[str, Any], state: dict[str, Any], measured: float | None
) -> dict[str, Any] | None:
    """Of a step by phase, of all evaluations and of what is left of the run; ranges. Where the run has a pace already,
    that is what its steps are taken to last."""
    if not given.phases:
        return None
    phases = given.phases | {"other": BESIDE}
    step = (measured, measured) if measured else step_time.total(phases)
    longest = evaluation["max_tokens"]
    asked = step_time.answering(given.work, evaluation["answers"], max(1, longest // 2), longest)
    left = 0 if state["state"] == "complete" else config.train.steps - state["steps_done"]
    limit = 60 * config.train.max_minutes if config.train.max_minutes else math.inf
    most = max(0.0, limit - state["seconds_done"])
    share = left / config.train.steps
    within = [left if most == math.inf else min(left, math.ceil(most / one)) for one in step]  # the last begins in time
    steps = [min(left * one, most) for one in step]
    whole = [one + share * asking for one, asking in zip(steps, asked, strict=True)]
    return {
        "step": list(step_time.total(phases)),
        "phases": {name: list(sides) for name, sides in phases.items()},
        "evaluations": list(asked),
        "steps_left": left,
        "steps_in_time": within[::-1],
        "training_left": steps,
        "left": whole,
        "assumed": {name: list(sides) for name, sides in step_time.ASSUMED.items()},
    }


def _measured(run: RunFolder) -> float | None:
    """Median seconds of a step of the run in the folder."""
    if not run.metrics.is_file():
        return None
    seconds = [record["timing_s/step"] for record in read_jsonl(run.metrics)[SLOW_START:] if "timing_s/step" in record]
    return median(seconds) if seconds else None
