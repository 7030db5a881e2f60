"""The training loop, top to bottom.

    prompts + traces -> rollouts (vLLM) -> rewards (verifier processes) -> groups and advantages -> packing
      -> body and loss (FSDP2, fused head) -> optimizer -> weights back to vLLM -> metrics, checkpoint, evaluation

One rank. The normaliser of an update is known before its first backward; every micro-batch divides by the same number.
"""

from typing import Any, cast

import torch

from luffy import checkpoint, optim
from luffy.config import Config
from luffy.console import StepProgress
from luffy.data import Batches, Example
from luffy.errors import UserError
from luffy.evaluate import Evaluation, evaluate
from luffy.files import write_json
from luffy.groups import Group, Row
from luffy.interrupt import StopOnInterrupt
from luffy.metrics import UpdateMetrics, count_tokens, group_metrics
from luffy.packing import pack
from luffy.run_folder import RunFolder
from luffy.seeds import derive
from luffy.setup import Trainer, set_up
from luffy.timing import Phases, peak_memory_gib
from luffy.weight_sync import sync_weights


def train(config: Config, run: RunFolder, resume: bool = False) -> dict[str, Any]:
    """Train as `config` says, in `run`; returns the result that is also written to result.json.

    Raises:
        UserError: anything the user can mend; the run folder and its earlier checkpoints stay as they are.
    """
    if resume and run.is_complete(config):
        return cast(dict[str, Any], run.result)
    t, loop, batches = set_up(config, run, resume)
    with t:
        return train_steps(t, loop, batches)


def train_steps(t: Trainer, loop: dict[str, Any], batches: Batches) -> dict[str, Any]:
    """Evaluate, train until the steps, the minutes or the user's patience are used up, evaluate again."""
    config, run = t.config, t.run
    if loop["step"] == 0:
        loop["before"] = [e.record() for e in evaluate_all(t, 0, config.eval.limit)]

    with StopOnInterrupt() as stop, StepProgress(config.train.steps, loop["step"]) as progress:
        if loop["before"]:
            progress.accuracy(loop["before"][0]["accuracy"])
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

            record = record_step(loop, groups, rows, metrics, phases)
            t.log.write(step, record)
            if t.heldout and config.eval.every and step % config.eval.every == 0 and step < config.train.steps:
                progress.accuracy(evaluate_all(t, step, config.eval.every_limit, first_only=True)[0].accuracy)
            if config.checkpoint.every and step % config.checkpoint.every == 0:
                save(t, loop, batches)
            progress.step(step, record, share_done(config, loop))

    save(t, loop, batches)
    if stop.asked:
        raise KeyboardInterrupt
    result = {
        "objective": config.objective.name,
        "steps": loop["step"],
        "asked": {"steps": config.train.steps, "max_minutes": config.train.max_minutes},
        "train_minutes": round(loop["train_seconds"] / 60, 2),
        "response_tokens": loop["tokens"],
        "before": loop["before"],
        "after": [e.record() for e in evaluate_all(t, loop["step"], config.eval.limit)],
        "checkpoint": str(checkpoint.latest(run.checkpoints).relative_to(run.path)),  # type: ignore[union-attr]
    }
    run.finish(result)
    return result


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
            metrics.add(micro, out, normalizer, first_update=number == 0)
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
                f"gradient norm {norm}); the rows are in {dump}; start a new run with a lower optim.lr"
            )
    return metrics


def evaluate_all(t: Trainer, step: int, limit: int | None, first_only: bool = False) -> list[Evaluation]:
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
        t.evals.write(step, result.record() | result.scores())
        results.append(result)
    return results


def record_step(
    loop: dict[str, Any], groups: list[Group], rows: dict[int, list[Row]], metrics: UpdateMetrics, phases: Phases
) -> dict[str, float]:
    """The step's line of metrics.jsonl; adds its seconds and tokens to the loop's."""
    tokens = count_tokens([row for group in groups for row in group.rows])
    loop["train_seconds"] += phases.total
    loop["tokens"] += tokens
    return {
        **group_metrics(groups, sum(len(kept) for kept in rows.values())),
        **metrics.result(),
        **phases.seconds(),
        **{f"timing_per_token_ms/{name}": 1e3 * s / max(tokens, 1) for name, s in phases.by_name.items()},
        "perf/tokens_per_s": tokens / phases.total,
        "perf/peak_memory_gib": peak_memory_gib(),
        "perf/train_minutes": loop["train_seconds"] / 60,
    }


def save(t: Trainer, loop: dict[str, Any], batches: Batches) -> None:
    if loop["step"] == loop["saved"]:
        return
    loop["saved"] = loop["step"]
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
