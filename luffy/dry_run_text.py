"""What `luffy train --dry-run` found, for people."""

from collections.abc import Iterator
from typing import Any

from luffy.footprint import PARTS
from luffy.machines import GIB
from luffy.plan import HEADROOM
from luffy.wording import counted

PAGE = 13
"""Columns of what a line is about."""


def lines(found: dict[str, Any]) -> Iterator[str]:
    """found: of `luffy.dry_run.plan`."""
    stages = found["stages"]
    yield f"dry run of {found['recipe']}: nothing is trained, no weights are loaded, the run folder stays as it is"
    for number, stage in enumerate(stages, 1):
        of = f"stage {number} of {len(stages)}: " if len(stages) > 1 else ""
        yield ""
        yield f"{of}{stage['objective']} on {stage['model']}, {counted(found['ranks'], 'rank')}"
        changed = found["changed"] if stage is stages[0] else []
        for key in changed:
            yield from _said("" if key is not changed[0] else "changed", _change(key))
        folder = found["run_folder"] if stage is stages[-1] else f"{found['run_folder']}/first"
        yield from _said("run folder", f"{folder}: {_state(stage['state'], stages[number:])}")
        for about, texts in (
            ("data", _data(stage["data"])),
            ("step", _step(stage["step"])),
            ("length", _length(stage)),
            ("evaluation", _evaluation(stage["evaluation"])),
            ("memory", _memory(stage)),
            ("time", _time(stage)),
        ):
            for at, text in enumerate(texts):
                yield from _said("" if at else about, text)


def _said(about: str, text: str) -> Iterator[str]:
    yield f"  {about:{PAGE}}{text}"


def _change(key: dict[str, Any]) -> str:
    recipe, given = ("-" if key[name] is None else key[name] for name in ("recipe", "given"))
    return f"{key['key']} = {given} (recipe: {recipe})"


def _state(state: dict[str, Any], later: list[dict[str, Any]]) -> str:
    """later: stages that follow."""
    if state["state"] == "new":
        return "new, training begins with step 1"
    if state["state"] == "complete":
        done = f"complete after {counted(state['steps_done'], 'step')}"
        if later and later[0]["state"]["state"] == "complete":
            return done  # nothing goes on, and the result is that of the last
        return f"{done}; --resume {'goes on with stage 2' if later else 'prints its result again'}"
    if state["checkpoint"] is None:
        return "holds a run without a checkpoint; --resume begins with step 1"
    return f"holds a run; --resume goes on from {state['checkpoint']} with step {state['steps_done'] + 1}"


def _data(data: dict[str, Any]) -> Iterator[str]:
    yield f"{data['source']}: {data['report']}"
    spread = [_spread(what, data[f"{what}_tokens"]) for what in ("prompt", "trace") if data[f"{what}_tokens"]]
    yield f"{'; '.join(spread)}; {data['with_trace']:,} of {counted(data['kept'], 'problem')} with a trace"
    yield from data["notes"]


def _spread(what: str, lengths: dict[str, float]) -> str:
    return f"{what}s of {lengths['least']:,} to {lengths['most']:,} tokens, mean {lengths['mean']:,.0f}"


def _step(step: dict[str, Any]) -> Iterator[str]:
    rows = step["rollouts"] + step["traces"]
    yield (
        f"{counted(step['groups'], 'group')}, {rows:,.0f} rows: {_number(step['rollouts'])} rollouts, "
        f"{_number(step['traces'])} traces; {counted(step['updates'], 'update')}"
    )
    if step["rollouts"]:
        yield (
            f"about {step['tokens']:,} packed tokens if rollouts have {step['assumed_rollout_tokens']}, half of "
            f"rollout.max_tokens (assumed); at most {step['most_tokens']:,}"
        )
    else:
        yield f"about {step['tokens']:,} packed tokens, at most {step['most_tokens']:,}"
    yield f"in micro-batches of at most {step['tokens_per_micro']:,} tokens"


def _length(stage: dict[str, Any]) -> Iterator[str]:
    limit = f", or {stage['max_minutes']:g} minutes of training" if stage["max_minutes"] else ""
    every = stage["checkpoint_every"]
    saved = f"a checkpoint every {counted(every, 'step')} and at the end" if every else "a checkpoint at the end"
    yield f"{counted(stage['steps'], 'step')}, {stage['epochs']:.2f} epochs{limit}; {saved}"


def _evaluation(found: dict[str, Any]) -> Iterator[str]:
    sets = ", ".join(f"{name} ({counted(problems, 'problem')})" for name, problems in found["sets"].items())
    yield f"before and after: {sets or 'nothing'}"
    during = found["during"]
    if during["times"]:
        asked = counted(during["problems"], "problem")
        yield f"every {counted(during['every'], 'step')} {asked}, {counted(during['times'], 'time')}"
    if found["answers"]:
        yield f"{counted(found['answers'], 'answer')} in all, of at most {found['max_tokens']:,} tokens"


def _memory(stage: dict[str, Any]) -> Iterator[str]:
    memory = stage["memory"]
    if memory is None:
        yield f"unknown: {stage['unknown']}"
        return
    yield (
        f"{memory['needed'] / GIB:.1f} GiB of {memory['available'] / GIB:.1f} a rank on {stage['machine']['name']} "
        f"({HEADROOM:.0%} left free), {'fits' if memory['fits'] else 'does not fit'}; computed, at its peak: "
        f"{memory['peak']}"
    )
    for part in PARTS:
        if memory["parts"].get(part):
            yield f"{part:20s} {memory['parts'][part] / GIB:7.2f} GiB"
    if memory["problem"]:
        yield f"problem: {memory['problem']}"


def _time(stage: dict[str, Any]) -> Iterator[str]:
    seconds, measured = stage["seconds"], stage["measured_step"]
    if measured:
        yield f"a step took {measured:.3g} s so far (measured, median of this run)"
    if seconds is None:
        yield f"unknown: {stage['unknown'] or stage['machine']['rates']}"
        return
    phases = ", ".join(f"{name} {_range(sides)}" for name, sides in seconds["phases"].items())
    yield f"a step {_range(seconds['step'])}: {phases} (computed)"
    few, many = seconds["steps_in_time"]
    after = f"{few} to {many}" if few < many else few
    ends = "" if few == seconds["steps_left"] else f" (the limit ends the run after {after} of them)"
    yield (
        f"{counted(seconds['steps_left'], 'step')} left {_range(seconds['training_left'])}{ends}, with evaluations "
        f"{_range(seconds['left'])}; starting the engine and loading weights not counted"
    )
    yield f"{stage['machine']['rates']}; shares of them are assumed (docs/planning.md), so take it as an order of size"


def _range(sides: list[float]) -> str:
    low, high = sides
    return _span(low) if _span(low) == _span(high) else f"{_span(low)} - {_span(high)}"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"
