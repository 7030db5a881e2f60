"""`luffy plan`: what a run would hold and take, before anything but the model's config is there.

Predicts memory per GPU by part (`luffy.footprint`) and the time of a step (`luffy.step_time`), says what does not fit,
and searches meshes, recomputation, micro-batch budgets and vLLM's share of the memory for the fastest plan that does.
Imports neither torch nor transformers for a model that is known or local.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from luffy import footprint, step_time
from luffy.config import Config
from luffy.errors import UserError
from luffy.footprint import Load
from luffy.machines import GIB, Machine
from luffy.shapes import Shape

HEADROOM = 0.08
"""Share of a device's memory left free: what its allocator cannot use for fragments, and what is not counted."""
ENGINE_WORK = 1.5 * GIB
"""vLLM's own activations and logits beside its cache, where `kv_cache_gib` gives the cache a size: assumed."""
SAME = 0.03
"""A difference in time that no mesh is changed for."""
LEAST_CACHE = 2
"""Sequences of full length that a suggested cache holds at least."""


@dataclass(frozen=True)
class Choice:
    """What a plan may change, as the configuration names it."""

    replicate: int
    sequence: int
    tokens_per_micro: int
    recompute: bool | str
    memory_fraction: float | None
    """None: the cache has a size of its own (`kv_cache_gib`, or a CPU)."""
    offload: bool
    mlp_tokens: int | None
    on_cpu: bool

    def options(self) -> str:
        """As options of `luffy train`."""
        parts = [f"--mesh.replicate {self.replicate}", f"--mesh.sequence {self.sequence}"]
        parts += [f"--train.tokens_per_micro {self.tokens_per_micro}"]
        parts += [f"--model.gradient_checkpointing {str(self.recompute).lower()}"]
        parts += [f"--model.offload_activations {str(self.offload).lower()}"] if self.offload else []
        parts += [f"--model.mlp_tokens {self.mlp_tokens}"] if self.mlp_tokens else []
        parts += [f"--optim.on_cpu {str(self.on_cpu).lower()}"] if self.on_cpu else []
        parts += [f"--rollout.memory_fraction {self.memory_fraction}"] if self.memory_fraction is not None else []
        return " ".join(parts)


@dataclass(frozen=True)
class Asked:
    """A run, less what a plan may change."""

    config: Config
    shape: Shape
    machine: Machine
    gpus: int
    prompt: int
    """Longest prompt, tokens."""
    answer: int
    """Longest answer, tokens."""
    sampled: int
    """Longest rollout, tokens: `answer`, unless traces may be longer."""
    mean: int
    """Mean answer, tokens."""
    engine: bool = True
    """Whether every rank has a vLLM of its own."""
    mean_prompt: int | None = None
    """Tokens; None: half of the longest."""

    @property
    def adapters(self) -> tuple[int, int]:
        """(parameters, sum of the ranks) of one block's LoRA adapters."""
        lora = self.config.model.lora
        return (0, 0) if lora.rank is None else self.shape.adapters(lora.rank, lora.targets)

    @property
    def context(self) -> int:
        return self.prompt + self.answer

    def options(self, choice: Choice) -> str:
        """What makes the configuration the planned one: the choice, and the lengths where others were asked for."""
        data, sampled = self.config.data, self.config.rollout.max_tokens
        given = (data.max_prompt_tokens, sampled, max(sampled, data.max_trace_tokens))
        planned = (self.prompt, self.sampled, self.answer)
        if given == planned:
            return choice.options()
        names = ("data.max_prompt_tokens", "rollout.max_tokens", "data.max_trace_tokens")
        return " ".join([choice.options(), *(f"--{name} {n}" for name, n in zip(names, planned, strict=True))])

    @property
    def device(self) -> Any:
        return "cpu" if self.machine.name == "cpu" else "cuda"

    @property
    def memory(self) -> float:
        """Bytes that a rank may use."""
        whole = self.machine.memory / (self.gpus if self.device == "cpu" else 1)
        return whole * (1 - HEADROOM)


@dataclass(frozen=True)
class Plan:
    """A choice and what it comes to. Bytes and seconds."""

    choice: Choice
    moment: str
    parts: footprint.Parts
    host: float
    phases: dict[str, step_time.Range]
    work: step_time.Work
    memory: float
    problem: str | None

    @property
    def needed(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.problem is None


def ask(
    config: Config,
    shape: Shape,
    machine: Machine,
    gpus: int,
    context: int | None = None,
    mean_answer: int | None = None,
) -> Asked:
    """Check what is asked for.

    Raises:
        UserError: no ranks, a context that the model or its heads cannot have.
    """
    if gpus < 1:
        raise UserError(f"plan: --gpus must be at least 1, got {gpus}")
    prompt, sampled = config.data.max_prompt_tokens, config.rollout.max_tokens
    if context is None:
        context = prompt + max(sampled, config.data.max_trace_tokens)
    else:
        sampled = context
    if context < 2:
        raise UserError(f"plan: --context must be at least 2 tokens, got {context}")
    prompt = min(prompt, context // 2)
    if context > shape.positions:
        raise UserError(
            f"plan: sequences of {context:,} tokens are longer than the {shape.positions:,} positions of {shape.name}; "
            f"lower --context, or name a model made for more"
        )
    if shape.attention_softcap or (shape.window is not None and context > shape.window):
        reason = "a soft cap" if shape.attention_softcap else f"a window of {shape.window:,} tokens"
        raise UserError(f"plan: attention of {shape.name} has {reason}, which the trainer refuses; name another model")
    answer = context - prompt
    sampled = min(sampled, answer)
    mean = max(1, sampled // 2) if mean_answer is None else mean_answer
    if not 1 <= mean <= sampled:
        raise UserError(f"plan: --answer-tokens must lie between 1 and {sampled}, the longest rollout, got {mean}")
    return Asked(
        config, shape, machine, gpus, prompt, answer, sampled, mean, engine=config.rollout.engine == "colocated"
    )


def configured(asked: Asked) -> Choice:
    """What the configuration says.

    Raises:
        UserError: the ranks do not divide into the mesh, or the heads into `mesh.sequence`.
    """
    config, mesh = asked.config, asked.config.mesh
    if asked.gpus % (mesh.replicate * mesh.sequence):
        raise UserError(
            f"plan: {asked.gpus} GPUs cannot be split into mesh.replicate {mesh.replicate} x mesh.sequence "
            f"{mesh.sequence}; take a multiple of {mesh.replicate * mesh.sequence}, or change the mesh"
        )
    if asked.shape.heads % mesh.sequence:
        raise UserError(
            f"plan: mesh.sequence {mesh.sequence} must divide the {asked.shape.heads} attention heads of "
            f"{asked.shape.name}; take one of {', '.join(map(str, _divisors(asked.shape.heads)))}"
        )
    sized = asked.device == "cpu" or config.rollout.kv_cache_gib is not None
    return Choice(
        mesh.replicate,
        mesh.sequence,
        config.train.tokens_per_micro,
        config.model.gradient_checkpointing,
        None if sized or not asked.engine else config.rollout.memory_fraction,
        config.model.offload_activations,
        config.model.mlp_tokens,
        config.optim.on_cpu,
    )


def evaluate(asked: Asked, choice: Choice) -> Plan:
    """What this choice comes to, and what is wrong with it."""
    load, cache = load_of(asked, choice)
    moment, parts = footprint.peak(load)
    parts = parts | footprint.beside_updates(load, saves=asked.config.checkpoint.every > 0)
    work = _work(asked, choice, cache)
    problem = _problem(asked, choice, parts, cache)
    return Plan(
        choice, moment, parts, footprint.host_bytes(load), step_time.phases(work), work, asked.memory, problem
    )  # fmt: skip


def load_of(asked: Asked, choice: Choice) -> tuple[Load, float]:
    """The load of a rank, and the bytes of its engine's cache alone (negative where its weights leave no room)."""
    config, shape = asked.config, asked.shape
    dtype = 4 if config.model.dtype == "float32" else 2
    weights = (4 if (config.rollout.dtype or config.model.dtype) == "float32" else 2) * float(shape.parameters)
    if not asked.engine:
        weights = cache = share = 0.0
    elif choice.memory_fraction is not None:
        share = choice.memory_fraction * asked.machine.memory - weights
        cache = share - ENGINE_WORK
    else:
        cache = (config.rollout.kv_cache_gib or 1.0) * GIB
        share = cache + (ENGINE_WORK if asked.device == "cuda" else 0.0)
    tokens = min(max(choice.tokens_per_micro, asked.context), _longest_update(asked))
    local = -(-tokens // choice.sequence)
    whole = _tokens_per_update(asked)
    load = Load(
        shape=shape,
        tokens=local,
        targets=local,
        shards=asked.gpus // choice.replicate,
        sequence=choice.sequence,
        device=asked.device,
        bytes=dtype,
        recompute=choice.recompute,  # type: ignore[arg-type]
        offload=choice.offload,
        mlp_tokens=choice.mlp_tokens,
        on_cpu=choice.on_cpu,
        adapters=asked.adapters[0],
        adapter_ranks=asked.adapters[1],
        copied=_copied(asked),
        frozen="reference" in config.objective.networks and not config.model.reference_on_cpu,
        taught=len(set(config.objective.networks) - {"reference"}),
        accumulates=whole > tokens * asked.gpus / choice.sequence,
        engine=weights,
        kv=max(0.0, share),
    )
    return load, cache


def suggest(asked: Asked) -> Plan:
    """Of the plans that fit the fastest, or a simpler one as good as that; where none fits, the nearest to it."""
    start = configured(replace(asked, config=_without_mesh(asked.config)))
    nearest: Plan | None = None
    for extras in ({}, {"mlp_tokens": 4096}, {"offload": True, "mlp_tokens": 4096}, {"on_cpu": True},
                   {"on_cpu": True, "offload": True, "mlp_tokens": 4096}):  # fmt: skip
        fitting: list[Plan] = []
        for choice in _choices(asked, start):
            if extras.get("offload") and choice.recompute is not True:
                continue
            plan = evaluate(asked, _with_cache(asked, replace(choice, **extras)))
            if nearest is None or plan.needed < nearest.needed:
                nearest = plan
            if plan.fits:
                fitting.append(plan)
        if fitting:
            fastest = min(fitting, key=_rank)
            good = [plan for plan in fitting if _rank(plan)[0] <= (1 + SAME) * _rank(fastest)[0]]
            return min(good, key=lambda plan: (plan.choice.sequence, plan.choice.replicate, *_rank(plan)))
        if asked.device == "cpu":
            break
    assert nearest is not None, "the mesh of one sequence and one replica is always a choice"
    return nearest


def answer(asked: Asked) -> tuple[Plan, Plan, Plan | None]:
    """The plan that the configuration makes, the suggested one, and where none fits that of the update alone."""
    given = evaluate(asked, configured(asked))
    found = suggest(asked)
    if given.fits and (not given.phases or _rank(given) <= _rank(found)):
        found = given
    return given, found, None if found.fits or asked.device == "cpu" else suggest(replace(asked, engine=False))


def helps(asked: Asked, plan: Plan) -> str:
    """What would make a plan fit that nothing here can."""
    largest = max(plan.parts, key=lambda part: plan.parts[part])
    if largest == footprint.KV:
        return "a smaller rollout.kv_cache_gib, or none and a rollout.memory_fraction"
    if largest == footprint.ENGINE_WEIGHTS:
        return (
            "vLLM holds the whole model on every GPU, whatever the mesh; a GPU with more memory, a smaller model, or "
            "an engine that does not share the trainer's GPUs"
        )
    state = sum(plan.parts.get(part, 0.0) for part in (footprint.WEIGHTS, footprint.GRADIENTS, footprint.OPTIMIZER))
    if asked.device == "cpu":
        return "a smaller model, fewer tokens (train.tokens_per_micro, the context), or more memory"
    if state > asked.memory * 0.4:
        return "more GPUs, which take a smaller share of weights, gradients and optimizer each, or optim.on_cpu"
    return "a shorter context, more GPUs for mesh.sequence, or GPUs with more memory"


def _problem(asked: Asked, choice: Choice, parts: footprint.Parts, cache: float) -> str | None:
    engine = parts.get(footprint.ENGINE_WEIGHTS, 0.0)
    one = _sequence_bytes(asked)
    needed = sum(parts.values())
    if needed > asked.memory:
        largest = max(parts, key=lambda part: parts[part])
        return (
            f"needs {needed / GIB:.1f} GiB of {asked.memory / GIB:.1f}, {(needed - asked.memory) / GIB:.1f} too many; "
            f"most of it is {largest}, {parts[largest] / GIB:.1f} GiB"
        )
    if asked.engine and cache < one:
        share = f"rollout.memory_fraction {choice.memory_fraction}" if choice.memory_fraction else "its size"
        return (
            f"vLLM's cache has {max(0.0, cache) / GIB:.1f} GiB ({share}, weights {engine / GIB:.1f} GiB), and one "
            f"sequence of {asked.context:,} tokens takes {one / GIB:.1f}"
        )
    return None


def _choices(asked: Asked, start: Choice) -> Iterator[Choice]:
    nodes = max(1, asked.gpus // asked.machine.per_node)
    for replicate in _divisors(nodes):
        shards = asked.gpus // replicate
        for sequence in _divisors(min(shards, asked.machine.per_node)):
            if shards % sequence or asked.shape.heads % sequence:
                continue
            for recompute in (False, "selective", True):
                for tokens in _budgets(asked, sequence):
                    yield replace(
                        start, replicate=replicate, sequence=sequence, recompute=recompute, tokens_per_micro=tokens
                    )


def _budgets(asked: Asked, sequence: int) -> list[int]:
    """A sequence, and multiples of it up to 65,536 tokens a rank: beyond, larger products gain nothing."""
    budgets, most = [asked.context], max(65536 * sequence, asked.context)
    while 2 * budgets[-1] <= most and budgets[-1] < _tokens_per_update(asked):
        budgets.append(budgets[-1] * 2)
    return budgets


def _with_cache(asked: Asked, choice: Choice) -> Choice:
    """The same with as much memory for vLLM as training leaves and its sequences can use."""
    if choice.memory_fraction is None:
        return choice
    load, _ = load_of(asked, choice)
    trained = sum(footprint.peak(replace(load, engine=0.0, kv=0.0))[1].values())
    room = (asked.memory - trained) / asked.machine.memory
    sequences = max(LEAST_CACHE, _sequences(asked))
    wanted = load.engine + ENGINE_WORK + sequences * asked.context * step_time.kv_bytes(asked.shape)
    fraction = max(0.01, min(room, wanted / asked.machine.memory, 0.95))
    return replace(choice, memory_fraction=int(100 * fraction) / 100)


def _work(asked: Asked, choice: Choice, cache: float) -> step_time.Work:
    config = asked.config
    return step_time.Work(
        shape=asked.shape,
        machine=asked.machine,
        gpus=asked.gpus,
        replicate=choice.replicate,
        sequence=choice.sequence,
        tokens_per_micro=max(choice.tokens_per_micro, asked.context),
        recompute=choice.recompute,
        on_cpu=choice.on_cpu,
        prompts=config.train.prompts_per_step,
        rollouts=_rollouts(config) if asked.engine and cache >= _sequence_bytes(asked) else 0,
        rows=_rows(config),
        prompt=max(1, asked.prompt // 2) if asked.mean_prompt is None else asked.mean_prompt,
        answer=asked.mean,
        longest=asked.sampled,
        updates=config.train.updates_per_step,
        first_pass=config.first_pass,
        sequences=config.rollout.max_sequences,
        kv=max(0.0, cache),
        adapters=asked.adapters[0],
    )


def _copied(asked: Asked) -> float:
    """Tokens of prompts that attention lays out again, for each token of a group: one copy before each of its rows."""
    rows = _rows(asked.config)
    return 0.0 if rows == 1 else rows * asked.prompt / (asked.prompt + rows * asked.answer)


def _rollouts(config: Config) -> int:
    return config.objective.sampled


def _rows(config: Config) -> int:
    """Of a group, that enter the model."""
    return config.objective.sampled + config.objective.shown


def _sequence_bytes(asked: Asked) -> float:
    """Of vLLM's cache, that one sequence of full length takes."""
    return step_time.kv_bytes(asked.shape) * float(asked.context)


def _sequences(asked: Asked) -> int:
    """That a rank has to decode at a time, at most."""
    mine = -(-asked.config.train.prompts_per_step * _rollouts(asked.config) // asked.gpus)
    return min(mine, asked.config.rollout.max_sequences)


def _longest_update(asked: Asked) -> int:
    """Packed tokens of all ranks, if nothing were shorter than it may be: no micro-batch can hold more."""
    config = asked.config
    sampled = _rollouts(config)
    traces = config.objective.shown
    prompts = config.train.prompts_per_step // config.train.updates_per_step
    return prompts * (asked.prompt + sampled * asked.sampled + traces * asked.answer)


def _tokens_per_update(asked: Asked) -> int:
    """Packed tokens of all ranks, at the mean length."""
    config = asked.config
    rows = _rows(config)
    prompts = config.train.prompts_per_step // config.train.updates_per_step
    return prompts * (asked.prompt // 2 + rows * asked.mean)


def _rank(plan: Plan) -> tuple[float, float]:
    """By the middle of the step's time; where no rate is known, by how little is recomputed, then by large products."""
    low, high = step_time.total(plan.phases)
    if plan.phases:
        return (low + high) / 2, plan.needed
    return [False, "selective", True].index(plan.choice.recompute), -plan.choice.tokens_per_micro


def _without_mesh(config: Config) -> Config:
    return config.model_copy(update={"mesh": type(config.mesh)()})


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
