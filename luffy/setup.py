"""What has to exist before the first step: everything checked that is cheap to check, then everything loaded."""

from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch.optim import Optimizer

from luffy import checkpoint, distributed, lora, optim
from luffy.checks import check_model
from luffy.config import Config
from luffy.console import say
from luffy.data import Example, Ledger, Stream
from luffy.distributed import World
from luffy.dtypes import dtype_of
from luffy.errors import UserError, user_errors
from luffy.interrupt import StopOnInterrupt
from luffy.load import empty_lm, identity, load_weights, read_config
from luffy.loggers.started import Loggers, check
from luffy.metrics import MetricsLog, NoLog
from luffy.model import Policy, shard
from luffy.networks import Network, make_networks
from luffy.objectives import Objective, make_objective
from luffy.process import keep_freed_memory
from luffy.prompts import PromptTemplate
from luffy.rewards import VerifierPool
from luffy.rollout import make_engine
from luffy.rollout.engine import Engine
from luffy.run_folder import RunFolder
from luffy.sources import load_sets, load_template, resolve
from luffy.token_records import TokenRecords
from luffy.watchdog import Watchdog


@dataclass(slots=True, kw_only=True)
class Trainer:
    """The parts that a step is made of."""

    config: Config
    run: RunFolder
    world: World
    device: torch.device
    template: PromptTemplate
    examples: list[Example]
    heldout: dict[str, list[Example]]
    validation: list[Example]
    """Empty: the first held-out set serves during training."""
    objective: Objective
    policy: Policy
    optimizer: Optimizer
    networks: list[Network]
    """Beside the policy, where the objective asks for some."""
    engine: Engine
    verifier: VerifierPool
    checkpoints: checkpoint.Checkpointer
    watch: Watchdog
    stop: StopOnInterrupt
    log: MetricsLog | NoLog
    evals: MetricsLog | NoLog
    tokens: TokenRecords
    loggers: Loggers
    """Of the rank that writes; the others start none."""
    resources: ExitStack
    """Closes the folder's lock, the logs, the verifier, the engine, the process group and the loggers, newest first."""
    version: int = 0
    """Updates that the policy has seen; the engine may have fewer of them."""

    @classmethod
    def bare(cls, config: Config, world: World, policy: Policy, optimizer: Optimizer) -> Self:
        """One that can `update` and nothing else: without data, engine and files. For benchmarks and tests."""
        parts: dict[str, Any] = dict.fromkeys(field.name for field in fields(cls))
        parts |= {"config": config, "world": world, "device": world.device, "policy": policy, "optimizer": optimizer}
        parts["networks"] = []
        return cls(**parts | {"objective": make_objective(config.objective)})

    @property
    def optimizers(self) -> list[Optimizer]:
        """The policy's, and those of the networks beside it that are trained."""
        return [self.optimizer, *(network.optimizer for network in self.networks if network.optimizer is not None)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.resources.__exit__(*exception)


def set_up(
    config: Config, run: RunFolder, resume: bool, engine: Engine | None = None
) -> tuple[Trainer, dict[str, Any], Ledger]:
    """Check everything cheap first, then load; returns the trainer, the loop's state and the ledger of prompts.

    engine: one that is there already, as `luffy.train.train` says.
    """
    with ExitStack() as resources:
        # first, so that it closes last: they may take a while, in which nothing else is held
        loggers = resources.enter_context(Loggers(run.path, config.log))
        world = resources.enter_context(distributed.joined(config.mesh))
        stop, hang_s = StopOnInterrupt(), 60 * config.train.hang_minutes or None
        watch = resources.enter_context(Watchdog(world.store, world.rank, world.size, stop, hang_s=hang_s))
        with watch.together():
            trainer, loop, ledger = _set_up(config, run, resume, engine, world, watch, stop, loggers, resources)
        trainer.resources = resources.pop_all()  # what fails before this line is closed here, the rest by the trainer
        return trainer, loop, ledger


def _set_up(
    config: Config,
    run: RunFolder,
    resume: bool,
    engine: Engine | None,
    world: World,
    watch: Watchdog,
    stop: StopOnInterrupt,
    loggers: Loggers,
    resources: ExitStack,
) -> tuple[Trainer, dict[str, Any], Ledger]:
    if world.is_main:
        run.check(config, resume)
        check(config.log)
    path = base = resolve(config.model)
    template = load_template(path, config.model)
    sets = load_sets(config, template)
    say(f"problems: {sets.training.report}")
    for note in sets.notes:
        say(note)
    training, validation = sets.training, sets.validation
    with user_errors("train"):
        ledger = Ledger(Stream(len(training.examples), config.train.prompts_per_step, config.train.seed))
        verifier = resources.enter_context(
            VerifierPool(config.reward.grader, config.reward.workers, config.reward.timeout_s)
        )
    if world.is_main:
        resources.enter_context(run.lock())
        run.check(config, resume)  # again: another process may have been here while the problems were read
        if resume:
            run.recover()
    world.barrier()  # nobody looks for checkpoints before the folder is tidy
    found = checkpoint.resumable(run.checkpoints) if resume else None
    if found:
        path = str(found)
        checkpoint.refuse_other_sizes(found, read_config(path, config.model), read_config(base, config.model))
        say(f"resuming from {found}")

    watch.phase("load")
    described = read_config(path, config.model)
    objective, max_model_len = check_model(config, described, training.examples)
    keep_freed_memory()
    torch.manual_seed(config.train.seed)
    adapts = config.model.lora.rank is not None
    weights = base if adapts else path
    policy = Policy(empty_lm(weights, config.model), config.rollout.temperature, config.model.offload_activations)
    loop: dict[str, Any] = {"step": 0, "saved": 0, "updates": 0, "bad_in_a_row": 0, "train_seconds": 0.0, "tokens": 0}
    if found:
        loop = checkpoint.load_loop(found)
    rounded = adapts and found is not None  # the merged weights in its files
    given = engine is not None
    if engine is None:
        engine = make_engine(
            path,
            config,
            eos_token_id=template.eos_token_id,
            sizes={
                "vocabulary": described.vocab_size,
                "hidden size": described.hidden_size,
                "blocks": described.num_hidden_layers,
            },
            max_model_len=max_model_len,
            folder=run.path,
            world=world,
            version=-1 if rounded else loop["updates"],
        )
        resources.enter_context(engine)
    policy = shard(policy, world.params, dtype_of(config.model.dtype), config.optim.on_cpu)
    masters = torch.device("cpu") if config.optim.on_cpu else world.device
    load_weights(policy.train(), weights, world.device, weights_on=masters)
    if adapts:
        lora.initialise(policy.lm, config.train.seed)
    optimizer = optim.make_optimizer(policy, config.optim)
    networks = make_networks(config, base, world)
    if found:
        if adapts:
            checkpoint.load_adapters(found, policy)
        checkpoint.load_optimizer(found, policy, optimizer)
        checkpoint.load_networks(found, networks)
        if remembered := checkpoint.load_remembered(found):
            objective.load_state(remembered)
        with user_errors("resume"):
            ledger.load_state_dict(loop.get("ledger") or from_batches(loop["batches"]))
    if adapts or networks:
        mine = identity(base)
        if loop.setdefault("base", mine) != mine:
            raise UserError(f"resume: {config.model.name} is not what the run began with; bring its files back")
    if given:  # whatever weights it has
        engine.sync(policy, dtype_of(config.rollout.dtype or config.model.dtype), loop["updates"])
    if world.is_main:
        run.open(config, template.doubt)  # last, so that a start that fails leaves no run behind
    best = "accuracy on eval.validation" if validation else None
    checkpoints = checkpoint.Checkpointer(run.checkpoints, config.checkpoint.keep, best=best)
    trainer = Trainer(
        config=config,
        run=run,
        world=world,
        device=world.device,
        template=template,
        examples=training.examples,
        heldout=sets.heldout,
        validation=validation,
        objective=objective,
        policy=policy,
        optimizer=optimizer,
        networks=networks,
        engine=engine,
        verifier=verifier,
        checkpoints=resources.enter_context(closing(checkpoints)),
        watch=watch,
        stop=stop,
        log=open_log(run.metrics, loop["step"], world, resources),
        evals=open_log(run.evals, loop["step"], world, resources),
        tokens=TokenRecords(run.tokens, config.eval.token_groups),
        loggers=loggers,
        resources=resources,
        version=loop["updates"],
    )
    if world.is_main:
        loggers.start()
    trainer.tokens.resume(trainer, loop["step"])
    return trainer, loop, ledger


def from_batches(state: dict[str, Any]) -> dict[str, Any]:
    """A ledger's state from a checkpoint that has whole batches instead."""
    per_epoch = state["n"] - state["n"] % state["batch_size"]
    low = state["epoch"] * per_epoch + state["cursor"] * state["batch_size"]
    return {name: state[name] for name in ("n", "batch_size", "seed")} | {"low": low, "beyond": []}


def open_log(path: Path, step: int, world: World, resources: ExitStack) -> MetricsLog | NoLog:
    return resources.enter_context(closing(MetricsLog(path, step))) if world.is_main else NoLog()
