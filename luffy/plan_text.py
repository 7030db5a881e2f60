"""A plan for people, and as JSON."""

from dataclasses import asdict
from typing import Any

from luffy import step_time
from luffy.flops import mfu
from luffy.footprint import PARTS, moments
from luffy.machines import GIB
from luffy.plan import HEADROOM, Asked, Plan, helps, load_of


def text(asked: Asked, configured: Plan, suggested: Plan, apart: Plan | None) -> str:
    """The whole answer: what was asked, the configured plan, and the suggested one where it differs.

    apart: the best plan without an engine in the trainer's process, where none fits with it."""
    lines = [_heading(asked), "", f"as configured: {'fits' if configured.fits else 'does not fit'}"]
    lines += _describe(asked, configured)
    if suggested.choice == configured.choice and configured.fits:
        lines += ["", "nothing faster fits" if configured.phases else "nothing has to change"]
    elif suggested.fits:
        why = "" if not configured.fits else ", the fastest that was found"
        lines += ["", f"suggested{why}: fits", *_describe(asked, suggested)]
        lines += [f"  options    {asked.options(suggested.choice)}"]
    else:
        lines += ["", "nothing fits; nearest:", *_describe(asked, suggested)]
        lines += [f"  would help {helps(asked, suggested)}"]
        if apart is not None and apart.fits:
            lines += ["", "the update alone, with no vLLM on these GPUs: fits", *_describe(asked, apart)]
            lines += [f"  options    {asked.options(apart.choice)}"]
    if suggested.phases:
        lines += ["", "assumed, not measured (fastest - slowest):"]
        lines += [f"  {name}: {_share(low)} - {_share(high)}" for name, (low, high) in step_time.ASSUMED.items()]
        lines += [f"  answers of {asked.mean:,} tokens on average, prompts of {suggested.work.prompt:,}"]
    return "\n".join(lines)


def record(asked: Asked, configured: Plan, suggested: Plan, apart: Plan | None) -> dict[str, Any]:
    """The same as JSON: bytes, seconds, tokens, FLOP."""
    machine = asdict(asked.machine)
    return {
        "model": asdict(asked.shape) | {"parameters": asked.shape.parameters},
        "machine": machine,
        "gpus": asked.gpus,
        "context": asked.context,
        "mean_answer": asked.mean,
        "headroom": HEADROOM,
        "assumed": {name: list(sides) for name, sides in step_time.ASSUMED.items()},
        "configured": _plan(asked, configured),
        "suggested": _plan(asked, suggested),
        "without_engine": None if apart is None else _plan(asked, apart),
    }


def _plan(asked: Asked, plan: Plan) -> dict[str, Any]:
    load, _ = load_of(asked, plan.choice)
    return {
        "fits": plan.fits,
        "problem": plan.problem,
        "choice": asdict(plan.choice) | {"shard": asked.gpus // (plan.choice.replicate * plan.choice.sequence)},
        "options": asked.options(plan.choice),
        "needed_bytes": plan.needed,
        "memory_bytes": plan.memory,
        "host_bytes": plan.host,
        "peak": plan.moment,
        "parts": plan.parts,
        "moments": {name: sum(parts.values()) for name, parts in moments(load).items()},
        "seconds": plan.phases,
        "tokens": plan.work.tokens,
        "flops": plan.work.flops,
    }


def _heading(asked: Asked) -> str:
    shape, machine = asked.shape, asked.machine
    where = f"{asked.gpus} x {machine.name}, {machine.memory / GIB:.0f} GiB each"
    if asked.device == "cpu":
        where = f"{asked.gpus} rank{'s' if asked.gpus > 1 else ''} on this CPU, {machine.memory / GIB:.1f} GiB in all"
    return (
        f"{shape.name}: {shape.parameters / 1e9:.2f} B parameters; {where}; sequences of up to {asked.context:,} "
        f"tokens ({asked.prompt:,} of them prompt)"
    )


def _describe(asked: Asked, plan: Plan) -> list[str]:
    choice = plan.choice
    shard = asked.gpus // (choice.replicate * choice.sequence)
    recompute = choice.recompute if isinstance(choice.recompute, str) else "on" if choice.recompute else "off"
    lines = [
        f"  mesh       replicate {choice.replicate} x shard {shard} x sequence {choice.sequence}; "
        f"{choice.tokens_per_micro:,} tokens a micro-batch; gradient checkpointing {recompute}"
        + ("; block inputs in host memory" if choice.offload else "")
        + (f"; MLP {choice.mlp_tokens:,} tokens at a time" if choice.mlp_tokens else "")
        + ("; optimizer in host memory" if choice.on_cpu else "")
    ]
    lines += [
        f"  memory     {plan.needed / GIB:.1f} GiB of {plan.memory / GIB:.1f} a rank ({HEADROOM:.0%} left free), at "
        f"its peak: {plan.moment}"
    ]
    shown = [(part, plan.parts[part] / GIB) for part in PARTS if plan.parts.get(part, 0.0) > 0]
    lines += [f"             {part:20s} {size:7.2f} GiB" for part, size in shown]
    if asked.device == "cuda" and plan.host:
        lines += [f"             {'(host memory':20s} {plan.host / GIB:7.2f} GiB)"]
    if plan.phases:
        low, high = step_time.total(plan.phases)
        lines += [
            f"  step       {_seconds(low)} - {_seconds(high)}: " + ", ".join(_phase(p) for p in plan.phases.items())
        ]
        busy = (mfu(plan.work.flops, seconds, asked.machine.flops, asked.gpus) for seconds in plan.phases["update"])
        rates = (plan.work.tokens / seconds / asked.gpus for seconds in (high, low))
        lines += [
            f"             {plan.work.tokens:,} packed tokens, {plan.work.flops:.2e} FLOP of updates, whose MFU is "
            f"{' - '.join(f'{x:.0%}' for x in busy)}; {' - '.join(f'{x:,.0f}' for x in rates)} tokens/s a GPU"
        ]
    if plan.problem:
        lines += [f"  problem    {plan.problem}"]
    return lines


def _phase(item: tuple[str, step_time.Range]) -> str:
    name, (low, high) = item
    return f"{name} {_seconds(low)} - {_seconds(high)}"


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else f"{value:,.0f} s"


def _share(value: float) -> str:
    return f"{value:.0%}" if value <= 1 else f"{value:g}"
