"""Seconds of a training step, as a range: counted work over a machine's peak rates, times the share of them assumed.

Every share is in `ASSUMED` and is printed with a plan. Nothing here was measured on a GPU. Left out: verifying,
packing, Python, stragglers among rollouts beyond the range of decode steps. docs/planning.md has the formulas.
"""

from dataclasses import dataclass, replace

from luffy.flops import attended_pairs, forward_flops, head_flops, step_flops
from luffy.machines import Machine
from luffy.shapes import Shape

Range = tuple[float, float]
"""(fastest, slowest), seconds."""

ASSUMED: dict[str, Range] = {
    "arithmetic of an update, share of the bf16 peak": (0.50, 0.30),
    "arithmetic of prefill and decoding": (0.50, 0.25),
    "memory bandwidth": (0.75, 0.40),
    "links and network": (0.80, 0.50),
    "Adam in host memory, GB/s": (60.0, 20.0),
    "tokens of a rank's micro-batch at which its products run at half speed": (256.0, 512.0),
}
UPDATE, ENGINE, MEMORY, LINKS, HOST, HALF = ASSUMED


@dataclass(frozen=True, kw_only=True)
class Work:
    """A step, as counted: lengths in tokens, means where not said otherwise."""

    shape: Shape
    machine: Machine
    gpus: int
    replicate: int
    sequence: int
    tokens_per_micro: int
    recompute: bool | str
    on_cpu: bool
    prompts: int
    rollouts: int
    """Per prompt, sampled."""
    rows: int
    """Per prompt, trained on."""
    prompt: int
    answer: int
    longest: int
    """Longest answer."""
    updates: int
    first_pass: bool
    sequences: int
    """That vLLM decodes at a time, at most."""
    kv: float
    """Bytes of vLLM's cache."""
    adapters: int = 0
    """Parameters of one block's LoRA adapters; 0: every weight is trained."""

    @property
    def trained(self) -> int:
        return self.shape.layers * self.adapters or self.shape.parameters

    @property
    def tokens(self) -> int:
        """Packed, of all ranks: prompts once."""
        return self.prompts * (self.prompt + self.rows * self.answer)

    @property
    def flops(self) -> int:
        """FLOP of the step's updates, recomputation not counted."""
        pairs = self.prompts * attended_pairs(self.prompt, [self.answer] * self.rows)
        targets = self.prompts * self.rows * self.answer
        return step_flops(self.shape, self.tokens, pairs, targets, self.first_pass, frozen=self.adapters > 0)


def phases(work: Work) -> dict[str, Range]:
    """Seconds by phase, named as in the metrics (`timing_s/...`); none where the machine's rates are unknown."""
    if not work.machine.flops:
        return {}
    return {
        name: (phase(work, 0), phase(work, 1))
        for name, phase in (("sync", _sync), ("rollout", _rollout), ("update", _update), ("optimizer", _optimizer))
        if name not in ("sync", "rollout") or work.rollouts
    }


def total(found: dict[str, Range]) -> Range:
    return sum(low for low, _ in found.values()), sum(high for _, high in found.values())


def answering(work: Work, problems: int, answer: int, longest: int) -> Range:
    """Seconds of one answer to each of so many problems, as an evaluation asks for; answer: mean, tokens."""
    asked = replace(work, prompts=problems, rollouts=1, answer=answer, longest=longest)
    return _rollout(asked, 0), _rollout(asked, 1)


def kv_bytes(shape: Shape) -> int:
    """Of one token in vLLM's cache, bfloat16."""
    return 2 * 2 * shape.key * shape.layers


def concurrent(work: Work) -> int:
    """Sequences that a rank decodes at a time: what it has, what is allowed, what fits into the cache."""
    mine = -(-work.prompts * work.rollouts // work.gpus)
    fitting = work.kv / (kv_bytes(work.shape) * (work.prompt + work.answer))
    return max(1, min(mine, work.sequences, int(fitting)))


def _rollout(work: Work, side: int) -> float:
    """Decoding reads the weights once a step and every sequence's cache; prompts are computed once each."""
    machine, shape = work.machine, work.shape
    mine, at_once = -(-work.prompts * work.rollouts // work.gpus), concurrent(work)
    waves = -(-mine // at_once)
    steps = waves * (work.answer, work.longest)[side]  # fastest: no rank waits for its longest answer
    cache = mine * work.answer * (work.prompt + work.answer / 2) * kv_bytes(shape)
    weights = steps * 2 * (shape.parameters - (0 if shape.tied else shape.head))  # one row of the embedding is read
    decode = (weights + cache) / (ASSUMED[MEMORY][side] * machine.bandwidth)
    once = -(-work.prompts // work.gpus)
    prefill = forward_flops(shape, work.prompt, attended_pairs(work.prompt, [])) * once
    generate = mine * (forward_flops(shape, work.answer, work.answer * (work.prompt + work.answer // 2)))
    arithmetic = prefill + generate + head_flops(shape, mine * work.answer)
    return max(decode, arithmetic / (ASSUMED[ENGINE][side] * machine.flops))


def _update(work: Work, side: int) -> float:
    """Arithmetic, recomputation included; collectives as far as they do not fit behind it; all-to-alls."""
    shape, machine = work.shape, work.machine
    flops = float(work.flops)
    if work.recompute:
        pairs = work.prompts * attended_pairs(work.prompt, [work.answer] * work.rows)
        again = forward_flops(shape, work.tokens, pairs)
        kept = shape.layers * 2 * shape.block_matrices * work.tokens
        flops += again if work.recompute is True else again - kept
    rows = work.tokens_per_micro / work.sequence
    compute = flops / (work.gpus * machine.flops * ASSUMED[UPDATE][side]) * (1 + ASSUMED[HALF][side] / rows)
    shards = work.gpus // work.replicate
    micros = max(work.updates, -(-work.tokens * work.sequence // (work.gpus * work.tokens_per_micro)))
    # gathered twice in bfloat16, reduced once in float32, and between replicas a share of that twice
    gathers = 1 if shards == 1 else 2
    moved = (gathers * 2 * shape.parameters + 4 * work.trained) * (shards - 1) / shards
    collectives = micros * moved / _speed(machine, shards, side)
    if work.replicate > 1:
        among = 2 * 4 * work.trained / shards / _speed(machine, work.gpus, side)
        collectives += micros * among
    passes = 4 if work.recompute is True else 3
    local = work.tokens / work.gpus
    away = (work.sequence - 1) / work.sequence  # of q, k, v and the output, what does not stay
    exchanged = passes * shape.layers * local * away * 2 * 2 * (shape.attention + shape.key)
    return max(compute, collectives) + exchanged / _speed(machine, work.sequence, side)


def _optimizer(work: Work, side: int) -> float:
    share = work.trained * work.replicate / work.gpus
    if work.on_cpu:  # gradients down, weights up, then Adam's 28 bytes a parameter
        return (
            work.updates * share * (8 / (ASSUMED[LINKS][side] * work.machine.host) + 28 / (ASSUMED[HOST][side] * 1e9))
        )
    return work.updates * share * 28 / (ASSUMED[MEMORY][side] * work.machine.bandwidth)


def _sync(work: Work, side: int) -> float:
    """Every rank gathers all weights in bfloat16."""
    shards = work.gpus // work.replicate
    moved = 2 * work.shape.parameters
    here = moved / (ASSUMED[MEMORY][side] * work.machine.bandwidth)
    return here if shards == 1 else here + moved * (shards - 1) / shards / _speed(work.machine, shards, side)


def _speed(machine: Machine, ranks: int, side: int) -> float:
    """bytes/s of a collective over so many ranks, neighbours first."""
    return ASSUMED[LINKS][side] * (machine.link if ranks <= machine.per_node else machine.network)
