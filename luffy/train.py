"""The training loop, top to bottom.

    prompts + traces -> rollouts (vLLM) -> rewards (verifier processes) -> groups and advantages -> packing
      -> body and loss (FSDP2, fused head) -> optimizer -> weights back to vLLM -> metrics, checkpoint, evaluation

One rank. The normaliser of an update is known before its first backward; every micro-batch divides by the same number.
"""

import signal
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from luffy import checkpoint, distributed, optim
from luffy.config import Config
from luffy.console import StepProgress, say
from luffy.data import Batches, Example
from luffy.errors import UserError, user_errors
from luffy.evaluate import Evaluation, evaluate
from luffy.files import write_json
from luffy.groups import Group, Row
from luffy.metrics import MetricsLog, UpdateMetrics, count_tokens, group_metrics
from luffy.model import Policy, load_lm, shard
from luffy.objectives import Objective, make_objective
from luffy.packing import pack
from luffy.process import keep_freed_memory
from luffy.prompts import PromptTemplate
from luffy.rewards import VerifierPool
from luffy.rollout.vllm_engine import VllmEngine
from luffy.run_folder import RunFolder
from luffy.seeds import derive
from luffy.sources import evaluation_sources, load_examples, load_template, resolve, training_source
from luffy.timing import Phases, peak_memory_gib
from luffy.weight_sync import sync_weights


@dataclass(slots=True)
class Trainer:
    """The parts that a step is made of."""

    config: Config
    run: RunFolder
    device: torch.device
    template: PromptTemplate
    examples: list[Example]
    heldout: dict[str, list[Example]]
    objective: Objective
    policy: Policy
    optimizer: Optimizer
    engine: VllmEngine
    verifier: VerifierPool
    engine_is_stale: bool = False


def train(config: Config, run: RunFolder, resume: bool = False) -> dict[str, Any]:
    """Train as `config` says, in `run`; returns the result that is also written to result.json.

    Raises:
        UserError: anything the user can mend; the run folder and its earlier checkpoints stay as they are.
    """
    if resume and run.is_complete(config):
        return run.result  # type: ignore[return-value]
    t, loop = set_up(config, run, resume)
    batches = Batches(len(t.examples), config.train.prompts_per_step, config.train.seed)
    if loop["batches"]:
        batches.load_state_dict(loop["batches"])
    log = MetricsLog(run.metrics, run.path / "tensorboard", loop["step"])
    evals = MetricsLog(run.evals, None, loop["step"])
    stop = StopOnInterrupt()
    if loop["step"] == 0:
        loop["before"] = [e.record() for e in evaluate_all(t, 0, evals, config.eval.limit)]
    progress = StepProgress(config.train.steps, loop["step"])

    while loop["step"] < config.train.steps and not out_of_time(config, loop) and not stop.asked:
        step = loop["step"] = loop["step"] + 1
        phases = Phases()
        examples = [t.examples[index] for index in batches.next()]

        with phases("sync"):
            if any(t.objective.num_rollouts(example) for example in examples):
                sync(t)
        with phases("rollout"):
            groups = roll_out(t, examples, step)
        with phases("verify"):
            grade(t, groups)
        with phases("update"):
            rows = {id(group): t.objective.assign(group) for group in groups}
            metrics = update(t, groups, rows, loop)

        loop["train_seconds"] += phases.total
        loop["tokens"] += (tokens := count_tokens([row for group in groups for row in group.rows]))
        record = group_metrics(groups, sum(len(kept) for kept in rows.values())) | metrics.result() | phases.seconds()
        record |= {
            "perf/tokens_per_s": tokens / phases.total,
            "perf/peak_memory_gib": peak_memory_gib(),
            "perf/train_minutes": loop["train_seconds"] / 60,
        }
        log.write(step, record)
        if config.eval.every and step % config.eval.every == 0 and step < config.train.steps:
            progress.accuracy(evaluate_all(t, step, evals, config.eval.every_limit, first_only=True)[0].accuracy)
        if config.checkpoint.every and step % config.checkpoint.every == 0:
            save(t, loop, batches)
        progress.step(step, record, share_done(config, loop))

    progress.close()
    save(t, loop, batches)
    if stop.asked:
        close(t, log, evals)
        raise KeyboardInterrupt
    after = [e.record() for e in evaluate_all(t, loop["step"], evals, config.eval.limit)]
    result = {
        "objective": config.objective.name,
        "steps": loop["step"],
        "asked": {"steps": config.train.steps, "max_minutes": config.train.max_minutes},
        "train_minutes": round(loop["train_seconds"] / 60, 2),
        "response_tokens": loop["tokens"],
        "before": loop["before"],
        "after": after,
        "checkpoint": str(checkpoint.latest(run.checkpoints).relative_to(run.path)),  # type: ignore[union-attr]
    }
    run.finish(result)
    close(t, log, evals)
    return result


def set_up(config: Config, run: RunFolder, resume: bool) -> tuple[Trainer, dict[str, Any]]:
    """Check everything cheap first, then load; returns the trainer and the loop's state."""
    path = resolve(config.model)
    template = load_template(path, config.model)
    training = load_examples(training_source(config), template, config, config.data.limit)
    say(f"problems: {training.report}")
    heldout = {}
    for name, source in evaluation_sources(config).items():
        heldout[name] = load_examples(source, template, config, None).examples
    with user_errors("train"):
        Batches(len(training.examples), config.train.prompts_per_step, config.train.seed)
        verifier = VerifierPool(config.reward.grader, config.reward.workers, config.reward.timeout_s)
    run.open(config, resume)
    found = checkpoint.latest(run.checkpoints) if resume else None
    if found:
        path = str(found)
        say(f"resuming from {found}")

    keep_freed_memory()
    torch.manual_seed(config.train.seed)
    mesh, device = distributed.init()
    engine = VllmEngine(
        path,
        config.rollout,
        dtype=config.rollout.dtype or config.model.dtype,
        max_model_len=config.data.max_prompt_tokens + max(config.rollout.max_tokens, config.eval.max_tokens or 0),
        trust_remote_code=config.model.trust_remote_code,
    )
    policy = Policy(load_lm(path, config.model), config.rollout.temperature).to(device)
    policy = shard(policy, mesh, optim.dtype_of(config.model.dtype)).train()
    optimizer = optim.make_optimizer(policy, config.optim)
    loop = {"step": 0, "updates": 0, "bad_in_a_row": 0, "train_seconds": 0.0, "tokens": 0, "batches": None}
    if found:
        loop = checkpoint.load_loop(found)
        checkpoint.load_optimizer(found, policy, optimizer)
    objective = make_objective(config.objective)
    parts = Trainer(
        config, run, device, template, training.examples, heldout, objective, policy, optimizer, engine, verifier
    )
    return parts, loop


def sync(t: Trainer) -> None:
    """Give the engine the policy's weights, if it is about to be asked and has older ones."""
    if t.engine_is_stale:
        sync_weights(t.policy, t.engine, optim.dtype_of(t.config.rollout.dtype or t.config.model.dtype))
        t.engine_is_stale = False


def roll_out(t: Trainer, examples: list[Example], step: int) -> list[Group]:
    """Groups of fresh rollouts plus the stored traces. Nothing is generated after a trace."""
    completions = t.engine.generate(
        [example.prompt_ids for example in examples],
        [t.objective.num_rollouts(example) for example in examples],
        temperature=t.config.rollout.temperature,
        max_tokens=t.config.rollout.max_tokens,
        seeds=[derive(t.config.train.seed, "rollout", step, index) for index in range(len(examples))],
    )
    groups = []
    for example, answers in zip(examples, completions, strict=True):
        rows = [
            Row(token_ids=a.token_ids, text=t.template.decode(a.token_ids), finished=a.finished, sampler_logp=a.logp)
            for a in answers
        ]
        for trace in example.traces[: t.objective.num_traces(example)]:
            rows.append(Row(token_ids=trace, text=t.template.decode(trace), is_trace=True))
        groups.append(Group(example=example, rows=rows))
    return groups


def grade(t: Trainer, groups: list[Group]) -> None:
    """Rewards of rollouts and traces alike: a trace is verified, never assumed right."""
    pairs = [(row, group.example.problem.answer) for group in groups for row in group.rows]
    verdicts = t.verifier.grade([(row.text, answer) for row, answer in pairs])
    for (row, _), verdict in zip(pairs, verdicts, strict=True):
        row.reward, row.verdict = verdict.reward, verdict.status


def update(t: Trainer, groups: list[Group], rows: dict[int, list[Row]], loop: dict[str, Any]) -> UpdateMetrics:
    """`updates_per_step` optimizer updates over the groups of a step."""
    config = t.config
    metrics = UpdateMetrics(t.objective.losses, config.objective.gamma)
    share = len(groups) // config.train.updates_per_step
    packs = [
        [m.to(t.device) for m in pack(groups[at : at + share], lambda g: rows[id(g)], config.train.tokens_per_micro)]
        for at in range(0, len(groups), share)
    ]
    if len(packs) > 1:  # later updates need the log-probs of the policy that sampled
        with torch.no_grad():
            for micro in (m for micros in packs for m in micros):
                micro.old_logp = t.policy(micro)
    total = config.train.steps * config.train.updates_per_step
    for number, micros in enumerate(packs):
        if not micros:
            continue  # every row of every group has a zero gradient
        normalizer, entropy_coef = t.objective.scales(sum(m.num_targets for m in micros))
        loss = 0.0
        for micro in micros:
            out = t.policy(micro, losses=t.objective.losses, normalizer=normalizer, entropy_coef=entropy_coef)
            out.loss.backward()
            loss += out.loss.item()
            metrics.add(micro, out, first_update=number == 0)
        lr = optim.learning_rate(config.optim, loop["updates"], total)
        norm, good = optim.step(t.optimizer, t.policy, config.optim.max_grad_norm, loss, lr)
        metrics.finish_update(loss, norm, lr, good)
        t.engine_is_stale = True
        loop["updates"] += 1
        loop["bad_in_a_row"] = 0 if good else loop["bad_in_a_row"] + 1
        if loop["bad_in_a_row"] >= config.optim.max_bad_steps:
            dump = dump_groups(t.run, groups, loop["step"])
            raise UserError(
                f"train: loss or gradient was not finite {loop['bad_in_a_row']} updates in a row (loss {loss}, "
                f"gradient norm {norm}); the rows are in {dump}; lower optim.lr, or resume from the last checkpoint"
            )
    return metrics


def evaluate_all(
    t: Trainer, step: int, log: MetricsLog, limit: int | None, first_only: bool = False
) -> list[Evaluation]:
    """Evaluate on every problem set (or the first), write samples and one record each."""
    sync(t)
    results = []
    for name, examples in list(t.heldout.items())[: 1 if first_only else None]:
        result = evaluate(
            name,
            examples[:limit],
            t.engine,
            t.verifier,
            t.template,
            temperature=t.config.eval.temperature,
            max_tokens=t.config.eval.max_tokens or t.config.rollout.max_tokens,
            seed=t.config.train.seed,
        )
        result.write_samples(t.run.samples / f"{name}-step-{step:06d}.jsonl")
        log.write(step, result.record())
        results.append(result)
    return results


def save(t: Trainer, loop: dict[str, Any], batches: Batches) -> None:
    loop["batches"] = batches.state_dict()
    folder, keep = t.run.checkpoints, t.config.checkpoint.keep
    checkpoint.save(folder, loop["step"], t.policy, t.optimizer, loop, t.template.tokenizer, keep)


def out_of_time(config: Config, loop: dict[str, Any]) -> bool:
    return config.train.max_minutes is not None and loop["train_seconds"] >= 60 * config.train.max_minutes


def share_done(config: Config, loop: dict[str, Any]) -> float:
    by_time = loop["train_seconds"] / (60 * config.train.max_minutes) if config.train.max_minutes else 0.0
    return max(loop["step"] / config.train.steps, by_time)


def dump_groups(run: RunFolder, groups: list[Group], step: int) -> str:
    """What the model was fed when the numbers went bad."""
    path = run.path / f"dump-step-{step:06d}.json"
    rows = [
        {"id": g.example.problem.id, "prompt_ids": g.example.prompt_ids, "token_ids": row.token_ids, "text": row.text}
        | {"is_trace": row.is_trace, "reward": row.reward, "advantage": row.advantage}
        for g in groups
        for row in g.rows
    ]
    write_json(path, rows)
    return str(path)


def close(t: Trainer, *logs: MetricsLog) -> None:
    for log in logs:
        log.close()
    t.verifier.close()
    t.engine.close()
    distributed.close()


class StopOnInterrupt:
    """The first Ctrl-C lets the step finish and saves; the second is an ordinary one."""

    def __init__(self) -> None:
        self.asked = False
        self._before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before)
        say(f"\nstopping after this step and saving; press Ctrl-C again to stop at once ({time.strftime('%H:%M:%S')})")
