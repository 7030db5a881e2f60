"""What has to exist before the first step: everything checked that is cheap to check, then everything loaded."""

from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.optim import Optimizer

from luffy import checkpoint, distributed, optim
from luffy.config import Config
from luffy.console import say
from luffy.data import Batches, Example
from luffy.errors import user_errors
from luffy.metrics import MetricsLog
from luffy.model import Policy, load_lm, shard
from luffy.objectives import Objective, make_objective
from luffy.process import keep_freed_memory
from luffy.prompts import PromptTemplate
from luffy.rewards import VerifierPool
from luffy.rollout.vllm_engine import VllmEngine
from luffy.run_folder import RunFolder
from luffy.sources import evaluation_sources, load_examples, load_template, resolve, training_source


@dataclass(slots=True, kw_only=True)
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
    log: MetricsLog
    evals: MetricsLog
    resources: ExitStack
    """Closes the folder's lock, the logs, the verifier, the engine and the process group, newest first."""
    engine_is_stale: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.resources.__exit__(*exception)


def set_up(config: Config, run: RunFolder, resume: bool) -> tuple[Trainer, dict[str, Any], Batches]:
    """Check everything cheap first, then load; returns the trainer, the loop's state and the stream of batches."""
    with ExitStack() as resources:
        trainer, loop, batches = _set_up(config, run, resume, resources)
        trainer.resources = resources.pop_all()  # what fails before this line is closed here, the rest by the trainer
        return trainer, loop, batches


def _set_up(
    config: Config, run: RunFolder, resume: bool, resources: ExitStack
) -> tuple[Trainer, dict[str, Any], Batches]:
    run.check(config, resume)
    path = resolve(config.model)
    template = load_template(path, config.model)
    training = load_examples(
        training_source(config), template, config, split=config.data.split, limit=config.data.limit
    )
    say(f"problems: {training.report}")
    heldout = {}
    for name, source in evaluation_sources(config).items():
        loaded = load_examples(source, template, config, split=config.eval.split)
        heldout[name] = loaded.examples
        if loaded.report.prompts_too_long:
            say(f"{name}: {loaded.report}")
    if not heldout:
        say("no held-out problems: set eval.path to measure accuracy before, during and after")
    with user_errors("train"):
        batches = Batches(len(training.examples), config.train.prompts_per_step, config.train.seed)
        verifier = resources.enter_context(
            VerifierPool(config.reward.grader, config.reward.workers, config.reward.timeout_s)
        )
    resources.enter_context(run.lock())
    run.check(config, resume)  # again: another process may have been here while the problems were read
    if resume:
        run.recover()
    found = checkpoint.latest(run.checkpoints) if resume else None
    if found:
        path = str(found)
        say(f"resuming from {found}")

    keep_freed_memory()
    torch.manual_seed(config.train.seed)
    mesh, device = distributed.init()
    resources.callback(distributed.close)
    engine = resources.enter_context(
        VllmEngine(
            path,
            config.rollout,
            dtype=config.rollout.dtype or config.model.dtype,
            eos_token_id=template.eos_token_id,
            max_model_len=config.data.max_prompt_tokens + max(config.rollout.max_tokens, config.eval.max_tokens or 0),
            trust_remote_code=config.model.trust_remote_code,
        )
    )
    policy = Policy(load_lm(path, config.model), config.rollout.temperature).to(device)
    policy = shard(policy, mesh, optim.dtype_of(config.model.dtype)).train()
    optimizer = optim.make_optimizer(policy, config.optim)
    loop: dict[str, Any] = {"step": 0, "saved": 0, "updates": 0, "bad_in_a_row": 0, "train_seconds": 0.0, "tokens": 0}
    if found:
        loop = checkpoint.load_loop(found)
        checkpoint.load_optimizer(found, policy, optimizer)
        with user_errors("resume"):
            batches.load_state_dict(loop["batches"])
    run.open(config)  # last, so that a start that fails leaves no run behind
    logs = [
        resources.enter_context(closing(MetricsLog(path, tensorboard, loop["step"])))
        for path, tensorboard in (
            (run.metrics, run.path / "tensorboard"),
            (run.evals, run.path / "tensorboard" / "evals"),
        )
    ]
    trainer = Trainer(
        config=config,
        run=run,
        device=device,
        template=template,
        examples=training.examples,
        heldout=heldout,
        objective=make_objective(config.objective),
        policy=policy,
        optimizer=optimizer,
        engine=engine,
        verifier=verifier,
        log=logs[0],
        evals=logs[1],
        resources=resources,
    )
    return trainer, loop, batches
