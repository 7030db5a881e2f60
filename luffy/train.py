"""The training loop, top to bottom.

    prompts + traces -> rollouts (vLLM) -> rewards (verifier processes) -> groups and advantages -> packing
      -> body and loss (FSDP2, fused head) -> optimizer -> weights back to vLLM -> metrics, checkpoint, evaluation

Every rank samples and grades its share of the prompts; then all hold all groups, so that what follows needs no further
talk: each works out the same packing and takes its part. The normaliser of an update is known before its first
backward; every micro-batch of every rank divides by the same number, and sums are all that ranks exchange.
"""

from collections import Counter
from functools import partial
from typing import Any, cast

import torch

from luffy import checkpoint, optim, timeline
from luffy.config import Config
from luffy.console import StepProgress
from luffy.correction import correct
from luffy.data import Example, Ledger
from luffy.errors import UserError
from luffy.evaluate import Evaluation, digest_of, evaluate, recorded
from luffy.files import write_json
from luffy.groups import Group
from luffy.interrupt import Stopped
from luffy.metrics import UpdateMetrics, count_tokens, group_metrics, work_metrics
from luffy.networks.judge import judge
from luffy.objectives import Terms
from luffy.objectives.looking import Seen
from luffy.packing import MicroBatch
from luffy.rollout.engine import Engine
from luffy.run_folder import RunFolder
from luffy.sampling import Batch, awake, sampling, sync
from luffy.setup import Trainer, set_up
from luffy.share import share_of
from luffy.timing import Phases, peak_memory_gib

MOST_GAP = 0.5
"""Nats. Types and kernels account for a hundredth of it, weights that did not arrive for several times as much."""


def train(config: Config, run: RunFolder, resume: bool = False, engine: Engine | None = None) -> dict[str, Any]:
    """Train as `config` says, in `run`; returns the result that is also written to result.json.

    Args:
        engine: one that is there already, for many runs of one process: of a model of the same sizes and tokenizer,
            with room for this run's sequences. It takes the run's weights whatever it has, and stays open.

    Raises:
        UserError: anything the user can mend; the run folder and its earlier checkpoints stay as they are.
    """
    if resume and run.is_complete(config):
        return cast(dict[str, Any], run.result)
    t, loop, ledger = set_up(config, run, resume, engine)
    with t, t.watch.together():
        result = train_steps(t, loop, ledger)
        t.watch.close()  # what follows takes each rank its own time
        return result


def train_steps(t: Trainer, loop: dict[str, Any], ledger: Ledger) -> dict[str, Any]:
    """Evaluate, train until the steps, the minutes or the user's patience are used up, evaluate again."""
    config, run = t.config, t.run
    if loop["step"] == 0:
        loop["before"] = evaluate_all(t, 0)

    with t.stop, StepProgress(config.train.steps, loop["step"]) as progress:
        if loop["before"]:
            progress.accuracy(loop["before"][0]["accuracy"])
        with sampling(t, ledger, loop["step"] + 1) as sampled:
            while loop["step"] < config.train.steps and not out_of_time(config, loop) and not must_stop(t):
                step = loop["step"] = loop["step"] + 1
                phases = Phases(partial(t.watch.phase, step=step))
                mine = sampled(step, phases)
                with phases("gather"):
                    groups, counts = gather(t, mine, ledger)
                    loop["ledger"] = ledger.state_dict()
                behind = staleness(groups, t.version)
                with phases("update"):
                    taught = judge(t, groups, loop["updates"])
                t.tokens.see(t, step, groups)
                with phases("update"):
                    parts = split(t, groups, (step - 1) / config.train.steps)
                    metrics = update(t, parts, loop)
                t.objective.observe(groups)
                if config.rollout.max_staleness:
                    with phases("sync"):
                        sync(t)  # what is being sampled goes on with these

                record = record_step(t, loop, parts, metrics, phases) | behind | counts | taught | t.objective.metrics()
                record |= t.loggers.counts(step)
                if t.world.is_main:
                    timeline.append(t.run.timeline, step, phases.events)
                t.log.write(step, record)
                if config.rollout.engine != "replay":
                    check_engine(record)  # once it is written, for a report shows what was wrong
                score, due = None, config.eval.every and step % config.eval.every == 0
                if due and (t.validation or step < config.train.steps) and not must_stop(t):
                    score = evaluate_during(t, step, progress)
                    t.tokens.write(t, step)
                best = is_best(loop, score)
                if best or (config.checkpoint.every and step % config.checkpoint.every == 0):
                    save(t, loop, score)
                progress.step(step, record, share_done(config, loop))

        if not must_stop(t):
            t.tokens.write(t, loop["step"])
        save(t, loop)
        t.checkpoints.wait()
        t.watch.phase("evaluate", loop["step"])
        if must_stop(t):
            raise Stopped(t.stop.preempted)
        after = evaluate_all(t, loop["step"])
    result = {
        "objective": config.objective.name,
        "steps": loop["step"],
        "asked": {"steps": config.train.steps, "max_minutes": config.train.max_minutes},
        "train_minutes": round(loop["train_seconds"] / 60, 2),
        "response_tokens": loop["tokens"],
        "before": loop["before"],
        "after": after,
        "checkpoint": f"{run.checkpoints.name}/{checkpoint.name_of(loop['saved'])}",
    }
    if "best" in loop:
        result["best"] = loop["best"] | {
            "checkpoint": f"{run.checkpoints.name}/{checkpoint.name_of(loop['best']['step'])}"
        }
    if t.world.is_main:
        run.finish(result)
    return result


def check_engine(record: dict[str, Any]) -> None:
    """Parity of log-probs, of all tokens that were sampled, where they are the policy's own: in every step that is not
    ahead, and the first that is.

    Raises:
        UserError: the engine samples from other weights than the policy's.
    """
    gap = record.get("rollout/logp_gap_mean")
    if record.get("rollout/staleness_max") == 0 and gap is not None and gap > MOST_GAP:
        raise UserError(
            f"rollout: the engine's log-probs differ from the trainer's by {gap:.2f} nats a token, so it has other "
            f"weights or another temperature; no checkpoint has this step. Resume the run; if it happens again, send "
            f"us config.toml and the model's config.json"
        )


def gather(t: Trainer, mine: Batch, ledger: Ledger) -> tuple[list[Group], dict[str, float]]:
    """The groups of all ranks, and what happened while they were sampled; their prompts are used up now. Collective."""
    batches = t.world.everyone(mine)
    groups = t.world.whole([batch.groups for batch in batches])
    ledger.use([group.position for group in groups] + [position for batch in batches for position in batch.given_up])
    counts = sum((batch.counts for batch in batches), Counter[str]())
    return groups, {name: float(counts[name]) for name in mine.counts}


def staleness(groups: list[Group], version: int) -> dict[str, float]:
    """Updates between the weights that sampled a token and those that learn from it, over a step's sampled tokens."""
    spans = [span for group in groups for row in group.rows for span in row.versions]
    tokens = sum(span.end - span.begin for span in spans)
    behind = [version - span.version for span in spans]
    if not tokens:
        return {}
    mean = sum((span.end - span.begin) * n for span, n in zip(spans, behind, strict=True)) / tokens
    return {"rollout/staleness_mean": mean, "rollout/staleness_max": float(max(behind))}


def split(t: Trainer, groups: list[Group], progress: float) -> list[Terms]:
    """What the objective makes of a step's groups, one for each of its updates, and updates of its own. progress: share
    of the steps that are over."""
    share = len(groups) // t.config.train.updates_per_step
    parts = [t.objective.terms(groups[at : at + share], progress) for at in range(0, len(groups), share)]
    return parts + t.objective.extra(groups, progress)


def update(t: Trainer, parts: list[Terms], loop: dict[str, Any]) -> UpdateMetrics:
    """One optimizer update for each part of a step, all of which every rank holds.

    Several updates need the log-probs of the policy before the first, and so does a correction (`luffy.correction`):
    either costs one forward pass of body and head over all rows, without a backward.
    """
    config = t.config
    metrics = UpdateMetrics(t.objective.losses, getattr(config.objective, "gamma", None))
    packs = [micro_batches(t, part) for part in parts]
    seen: dict[int, Seen] = {}
    if config.first_pass:
        with torch.no_grad():
            for number, micro in ((number, micro) for number, micros in enumerate(packs) for micro in micros):
                entropies = t.objective.looks == "entropy" and number == 0
                micro.old_logp, entropy = t.policy(micro, entropy=True) if entropies else (t.policy(micro), None)
                metrics.add_ratios(*correct(micro, config.correction))
                if number == 0:
                    seen[id(micro)] = Seen(micro.old_logp, entropy)  # by the weights of the first update
    total = config.train.steps * config.train.updates_per_step
    for number, (part, micros) in enumerate(zip(parts, packs, strict=True)):
        if not micros:
            continue  # every row of every group has a zero gradient
        given = {"losses": t.objective.losses, "normalizer": part.normalizer}
        given |= {"entropy_coef": part.entropy_coef, "kl_coef": part.kl_coef}
        loss = 0.0
        for micro in micros:
            look(t, micro, seen.get(id(micro)))
            out = t.policy(micro, **given)
            out.loss.backward()
            loss += out.loss.item()
            metrics.add(micro, out, part.normalizer, first_update=number == 0)
        [loss] = t.world.sum([loss])
        lr = optim.learning_rate(config.optim, loop["updates"] - loop.get("extra", 0), total)
        norm, good = optim.step(t.optimizer, t.policy, config.optim.max_grad_norm, loss, lr)
        for network in t.networks:
            if not network.learns_first:
                metrics.taught |= network.learn(micros, loop["updates"], total)
        metrics.finish_update(loss, norm, lr, good)
        loop["updates"] += 1
        loop["extra"] = loop.get("extra", 0) + part.extra
        t.version = loop["updates"]
        loop["bad_in_a_row"] = 0 if good else loop["bad_in_a_row"] + 1
        if loop["bad_in_a_row"] >= config.optim.max_bad_steps:
            groups = [group for part in parts for group in part.groups]
            dump = dump_groups(t.run, groups, loop["step"]) if t.world.is_main else "rank 0's dump"
            raise UserError(
                f"train: loss or gradient was not finite {loop['bad_in_a_row']} updates in a row (loss {loss}, "
                f"gradient norm {norm}); the rows are in {dump}; start a new run with a lower optim.lr"
            )
    metrics.reduce(t.world)
    return metrics


@torch.no_grad()
def look(t: Trainer, micro: MicroBatch, seen: Seen | None) -> None:
    """Let the objective weigh a micro-batch by what the policy says now, where it wants to. seen: what is known."""
    if t.objective.looks != "nothing":
        t.objective.weigh(micro, seen or Seen(*t.policy(micro, entropy=True)))


def micro_batches(t: Trainer, part: Terms) -> list[MicroBatch]:
    """This rank's share of the rows of an update."""
    rows = {id(group): rows for group, rows in zip(part.groups, part.rows, strict=True)}
    return share_of(t, part.groups, lambda group: rows[id(group)])


def evaluate_all(t: Trainer, step: int) -> list[dict[str, Any]]:
    """On every problem set that the run is judged by. What it was judged by already after its last step, before it was
    stopped, is read. Collective.

    Raises:
        Stopped: as asked, before a set; what is done is done.
    """
    done = t.world.everyone(t.run.read_evals() if t.world.is_main else [])[0]
    known = {record.get("problems"): recorded(record) for record in done if record["step"] == step}
    found = []
    for name, examples in t.heldout.items():
        chosen = examples[: t.config.eval.limit]
        if (digest := digest_of(name, chosen)) in known:
            found.append(known[digest])
            continue
        if found and must_stop(t):
            raise Stopped(t.stop.preempted)
        found.append(evaluate_set(t, name, chosen, step).record())
    return found


def evaluate_during(t: Trainer, step: int, progress: StepProgress) -> float | None:
    """On the validation set, whose accuracy is returned, or else on the first set that the run is judged by."""
    sets = {"validation": t.validation} if t.validation else t.heldout
    for name, examples in list(sets.items())[:1]:
        result = evaluate_set(t, name, examples[: t.config.eval.every_limit], step)
        progress.accuracy(result.accuracy)
        return result.accuracy if t.validation else None
    return None


def evaluate_set(t: Trainer, name: str, examples: list[Example], step: int) -> Evaluation:
    """Evaluate the policy as it is; writes samples and a record."""
    t.watch.phase("evaluate", step)
    sync(t)
    with awake(t):
        result = evaluate(
            name,
            examples,
            t.engine,
            t.verifier,
            t.template,
            temperature=t.config.eval.temperature,
            max_tokens=t.config.eval.max_tokens or t.config.rollout.max_tokens,
            seed=t.config.train.seed,
            world=t.world,
        )
    if t.world.is_main:
        result.write_samples(t.run.samples / f"{name}-step-{step:06d}.jsonl")
    t.evals.write(step, result.record() | result.scores() | {"problems": digest_of(name, examples)})
    return result


def record_step(
    t: Trainer,
    loop: dict[str, Any],
    parts: list[Terms],
    metrics: UpdateMetrics,
    phases: Phases,
) -> dict[str, float]:
    """The step's line of metrics.jsonl; adds its seconds and tokens to the loop's. Seconds by phase are rank 0's; what
    the pace, the minutes and the peak of memory come from is the largest of all ranks."""
    groups = [group for part in parts if not part.extra for group in part.groups]
    tokens = count_tokens([row for group in groups for row in group.rows])
    seconds, peak = t.world.largest([phases.total, peak_memory_gib()])
    loop["train_seconds"] += seconds
    loop["tokens"] += tokens
    active, counts = [rows for part in parts for rows in part.rows], t.engine.metrics()
    work: dict[str, float] = {}
    if t.policy.shape is not None:
        prompts = [len(group.example.prompt_ids) for part in parts for group in part.groups]
        work = work_metrics(
            t.policy.shape,
            active,
            prompts,
            phases.by_name["update"],
            ranks=t.world.size,
            first_pass=t.config.first_pass,
            frozen=t.config.model.lora.rank is not None,
        )
    return {
        **group_metrics(groups, sum(len(rows) for part in parts if not part.extra for rows in part.rows)),
        **dict(zip(counts, t.world.sum(list(counts.values())), strict=True)),
        **metrics.result(),
        **phases.seconds(),
        **phases.idle,
        **{f"timing_per_token_ms/{name}": 1e3 * s / max(tokens, 1) for name, s in phases.by_name.items()},
        **work,
        "perf/tokens_per_s": tokens / seconds,
        "perf/peak_memory_gib": peak,
        "perf/train_minutes": loop["train_seconds"] / 60,
    }


def must_stop(t: Trainer) -> bool:
    """Whether any rank was asked to stop. Collective: the ranks agree, on the reason too."""
    asked, preempted = map(bool, t.world.largest([t.stop.asked, t.stop.preempted]))
    if asked:
        t.stop.ask(preempted)
        t.stop.preempted |= preempted
    return asked


def is_best(loop: dict[str, Any], score: float | None) -> bool:
    """Whether this score of the validation set is higher than all before (of equals the newest); remembers it."""
    if score is None or ("best" in loop and score < loop["best"]["accuracy"]):
        return False
    loop["best"] = {"step": loop["step"], "accuracy": score}
    return True


def save(t: Trainer, loop: dict[str, Any], score: float | None = None) -> None:
    if loop["step"] == loop["saved"]:
        return
    t.watch.phase("save", loop["step"])
    loop["saved"] = loop["step"]
    remembered = t.objective.state() if t.world.is_main else {}
    t.checkpoints.save(loop["step"], t.policy, t.optimizer, loop, t.template.tokenizer, score, remembered, t.networks)


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
