"""One training update end to end on the quickstart's model: ours, the same with an eager head on padded batches, TRL's.

    python -m bench.step [--rounds 5] [--out bench/results/step-<cpu>.json]

The rows are like the quickstart's: groups of a prompt, rollouts and a trace. The rollouts are other problems'
solutions, cut at random lengths, with rewards that give every group advantages. All variants see the same rows and
advantages and take turns. An update is everything between verified groups and new weights: packing or padding, forward,
backward, clip, AdamW.

    ours         luffy.train.update: packed rows, prompts once, response tokens through linear_policy_loss
    eager        the same model and optimizer, rows padded in batches of similar length, log_softmax of fp32 logits
    TRL          GRPOTrainer's loss on the same padded batches, its accelerator's backward, the same optimizer step
    body alone   ours with a trivial loss in place of the head: what no head can improve on
    optimizer    clip and AdamW alone
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from luffy_kernels import PolicyLoss
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bench.machine import RESULTS, file_name, machine
from luffy import distributed, model, optim
from luffy.config import Config
from luffy.config_file import load_config
from luffy.data import Example
from luffy.dtypes import dtype_of
from luffy.files import write_json
from luffy.groups import Group, Row
from luffy.load import empty_lm, load_weights
from luffy.model import Policy, shard
from luffy.objectives import make_objective
from luffy.process import keep_freed_memory
from luffy.run_folder import cpu_name
from luffy.setup import Trainer
from luffy.sources import load_examples, load_template, resolve, training_source
from luffy.train import update

PAD = 0
ATTENTION = "eager"  # of padded rows: faster at these lengths than torch's 16-bit attention, whose backward is slow
GATE = 0.02  # loss and gradient norm of ours and eager, which differ by the rounding of bfloat16


def make_groups(config: Config, examples: list[Example]) -> list[Group]:
    """The rows of one step: as many and as long as the quickstart's."""
    rng, groups = random.Random(0), []
    traces = [trace for example in examples for trace in example.traces]
    for example in examples[: config.train.prompts_per_step]:
        rows = []
        for i in range(config.objective.rows - 1):
            ids = (*rng.choice(traces), *rng.choice(traces))[: rng.randint(12, config.rollout.max_tokens)]
            rows.append(Row(token_ids=ids, text="", reward=float(i == 0), sampler_logp=(-1.0,) * len(ids)))
        rows.append(Row(token_ids=example.traces[0], text="", reward=1.0, is_trace=True))
        groups.append(Group(example=example, rows=rows))
    return groups


class Bench:
    """The quickstart's trainer without an engine, and one step's groups."""

    def __init__(self) -> None:
        keep_freed_memory()  # as the trainer does
        torch.manual_seed(0)
        self.config = config = load_config("quickstart")
        self.path = resolve(config.model)
        template = load_template(self.path, config.model)
        examples = load_examples(training_source(config), template, config, split=config.data.split, limit=256).examples
        self.groups = make_groups(config, examples)
        self.world = distributed.start(config.mesh)
        self.terms = make_objective(config.objective).terms(self.groups, progress=0.0)
        self.trainer = self.make(Policy)

    def make(self, kind: type[Policy], attention: str | None = None) -> Trainer:
        lm = empty_lm(self.path, self.config.model)
        if attention is not None:  # padded rows have no layout
            lm.set_attn_implementation(attention)
        policy = kind(lm, self.config.rollout.temperature)
        policy = shard(policy, self.world.params, dtype_of(self.config.model.dtype)).train()
        load_weights(policy, self.path, self.world.device)
        optimizer = optim.make_optimizer(policy, self.config.optim)
        return Trainer.bare(self.config, self.world, policy, optimizer)

    def pairs(self) -> list[tuple[tuple[int, ...], Row]]:
        """(prompt, row) of every row that trains, by length."""
        pairs = zip(self.groups, self.terms.rows, strict=True)
        found = [(group.example.prompt_ids, row) for group, rows in pairs for row in rows]
        return sorted(found, key=lambda pair: len(pair[0]) + len(pair[1].token_ids))

    def batches(self) -> list[list[tuple[tuple[int, ...], Row]]]:
        """Rows of similar length, as many as fit the quickstart's token budget once padded."""
        made: list[list[tuple[tuple[int, ...], Row]]] = [[]]
        for pair in self.pairs():
            length = len(pair[0]) + len(pair[1].token_ids)
            if made[-1] and (len(made[-1]) + 1) * length > self.config.train.tokens_per_micro:
                made.append([])
            made[-1].append(pair)
        return made

    def optimize(self, trainer: Trainer) -> float:
        rate = self.config.optim.lr
        return optim.step(trainer.optimizer, trainer.policy, self.config.optim.max_grad_norm, 0.0, rate)[0]


class Eager(Policy):
    """Padded rows; logits of response tokens alone, their softmax in float32, LUFFY's two token losses on log-probs."""

    def forward(self, batch: list[tuple[tuple[int, ...], Row]], **loss: Any) -> Tensor:  # type: ignore[override]
        ids = pad_sequence([torch.tensor(prompt + row.token_ids) for prompt, row in batch], batch_first=True)
        starts = torch.tensor([len(prompt) for prompt, _ in batch])[:, None]
        ends = torch.tensor([len(prompt) + len(row.token_ids) for prompt, row in batch])[:, None]
        at = torch.arange(ids.shape[1] - 1)[None] + 1
        mask = (at >= starts) & (at < ends)
        attention = torch.arange(ids.shape[1])[None] < ends
        hidden = self.lm.get_decoder()(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        logits = self.lm.get_output_embeddings()(hidden[:, :-1][mask])
        scaled = logits.float() / self.head_options["temperature"]
        logp = scaled.log_softmax(-1).gather(-1, ids[:, 1:][mask][:, None])[:, 0]
        advantages, trace = (
            torch.tensor([getattr(row, name) for _, row in batch])[:, None].expand(mask.shape)[mask]
            for name in ("advantage", "is_trace")
        )
        gamma, p = loss["gamma"], logp.exp()
        per_token = torch.where(trace, -advantages * p / (p + gamma), -advantages * (logp - logp.detach()).exp())
        return per_token.sum() / loss["normalizer"]


def eager_update(bench: Bench, trainer: Trainer) -> tuple[float, float]:
    """(loss, gradient norm)."""
    normalizer = bench.terms.normalizer
    total = 0.0
    for batch in bench.batches():
        loss = trainer.policy(batch, normalizer=normalizer, gamma=bench.config.objective.gamma)
        loss.backward()
        total += loss.item()
    return total, bench.optimize(trainer)


def body_update(bench: Bench) -> None:
    """Ours with the head's place taken by a sum."""

    def trivial(hidden: Tensor, *_: Any, **__: Any) -> Any:
        zeros = torch.zeros(hidden.shape[0])
        total = hidden.float().mean()
        fields = dict.fromkeys(("logp", "entropy", "ratio", "kl"), zeros)
        return PolicyLoss(total, clipped=zeros.bool(), **fields)

    kept, model.linear_policy_loss = model.linear_policy_loss, trivial
    try:
        ours_update(bench)
    finally:
        model.linear_policy_loss = kept


def ours_update(bench: Bench) -> tuple[float, float]:
    """(loss, gradient norm)."""
    metrics = update(bench.trainer, [bench.terms], {"step": 1, "updates": 0, "bad_in_a_row": 0})
    return metrics.loss, metrics.grad_norms[0]


def optimizer_alone(bench: Bench) -> None:
    for parameter in bench.trainer.policy.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    bench.optimize(bench.trainer)


@functools.cache
def trl_trainer(path: str, temperature: float) -> Any:
    """A GRPOTrainer of this model, in bf16 autocast; what it is asked for is its loss."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=tempfile.gettempdir(),
        report_to=[], bf16=True, use_cpu=True, per_device_train_batch_size=8, num_generations=8,
        beta=0.0, epsilon=1e6, loss_type="dr_grpo", max_completion_length=128, temperature=temperature,
        gradient_checkpointing=False,
    )  # fmt: skip
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=ATTENTION)
    data = Dataset.from_list([{"prompt": "a"}] * 8)
    tokenizer = AutoTokenizer.from_pretrained(path)
    return GRPOTrainer(
        lm, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config, train_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip


def trl_update(bench: Bench, optimizer: Any) -> None:
    trainer = trl_trainer(str(bench.path), bench.config.rollout.temperature)
    trainer.current_gradient_accumulation_steps = len(bench.batches())  # what its loop sets
    for batch in bench.batches():
        prompts = [torch.tensor(prompt).flip(0) for prompt, _ in batch]
        prompt_ids = pad_sequence(prompts, batch_first=True, padding_value=PAD).flip(1)
        prompt_mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True).flip(1)
        answers = [torch.tensor(row.token_ids) for _, row in batch]
        completion_ids = pad_sequence(answers, batch_first=True, padding_value=PAD)
        completion_mask = pad_sequence([torch.ones_like(a) for a in answers], batch_first=True)
        inputs = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
            "advantages": torch.tensor([row.advantage for _, row in batch]),
            "num_items_in_batch": completion_mask.sum(),
        }
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, inputs)
        trainer.accelerator.backward(loss)
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), bench.config.optim.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def variants(bench: Bench, with_trl: bool) -> dict[str, tuple[str, Callable[[], object]]]:
    eager = bench.make(Eager, ATTENTION)
    made: dict[str, tuple[str, Callable[[], object]]] = {
        "ours": ("ours", lambda: ours_update(bench)),
        "eager": ("eager head, length-sorted padded batches", lambda: eager_update(bench, eager)),
        "body": ("body alone (ours, no head)", lambda: body_update(bench)),
        "optimizer": ("clip and AdamW alone", lambda: optimizer_alone(bench)),
    }
    if with_trl:
        trainer = trl_trainer(str(bench.path), bench.config.rollout.temperature)
        trainer.model.train()
        optimizer = optim.make_optimizer(trainer.model, bench.config.optim)
        made["trl"] = (
            "TRL GRPOTrainer (its own loss on every row), the same padded batches",
            lambda: trl_update(bench, optimizer),
        )
    return made


def measure(bench: Bench, rounds: int, with_trl: bool) -> dict[str, Any]:
    made = variants(bench, with_trl)
    times: dict[str, list[float]] = {name: [] for name in made}
    found = {name: made[name][1]() for name in ("ours", "eager")}  # from the same weights
    print("loss and gradient norm: " + ", ".join(f"{name} {values}" for name, values in found.items()), flush=True)
    for mine, other in zip(found["ours"], found["eager"], strict=True):
        if not abs(mine - other) <= GATE * abs(other):
            raise SystemExit(f"luffy: not timed, as the updates differ by more than {GATE:.0%}: {found}")
    for number in range(rounds + 1):  # the first warms up
        for name, (_, call) in made.items():
            began = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - began)
        print(f"round {number}: " + ", ".join(f"{n} {t[-1]:.2f} s" for n, t in times.items() if t), flush=True)
    s = {name: statistics.median(values) for name, values in times.items()}
    tokens = sum(len(row.token_ids) for _, row in bench.pairs())
    share = s["body"] / s["ours"]
    note = (
        f"{cpu_name()}, {torch.get_num_threads()} threads, medians of {rounds} interleaved updates of"
        f" {len(bench.pairs())} rows. Of ours, {share:.0%} is the body with the optimizer ({s['optimizer']:.2f} s),"
        f" which no head can shorten; the head takes {s['ours'] - s['body']:.2f} s."
    )
    listed = {name: {"label": made[name][0], "s": s[name], "all": times[name]} for name in made}
    return {"machine": machine(), "response_tokens": tokens, "variants": listed, "note": note}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="default: bench/results/step-<cpu>.json")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out, as where it is not installed")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    with_trl = not args.no_trl and importlib.util.find_spec("trl") is not None
    if not with_trl and not args.no_trl:
        print("luffy: trl is not installed and is left out; scripts/bench.sh installs it", file=sys.stderr)
    out = args.out or RESULTS / file_name("step", cpu_name(), "json")
    try:
        bench = Bench()
        result = measure(bench, args.rounds, with_trl)
    except KeyboardInterrupt:
        print("\nluffy: stopped; nothing was written.", file=sys.stderr)
        return 130
    finally:
        distributed.close()
    write_json(out, result)
    print(result["note"], f"written to {out}", sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
