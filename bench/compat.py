"""What adapters save: one update's forward and backward through a framework's own head, and through ours in its place.

    python -m bench.compat [--rounds N] [--store]

A model with a small body (two blocks of 256) and a real head (151,936 x 256), four sequences of 256 tokens, float32.
Time: median of rounds that take turns in one process. Memory: the process's peak beyond what it has before the update,
in a fresh process for each. TRL's head is asked for what GRPO wants (log-probs and entropies of the last half of each
sequence) and what SFT does (whether the target is the most likely token, too). "GRPOTrainer" is TRL's trainer as it is
installed: its `training_step` less what it takes to sample, with 64 sampled tokens, in three processes of four steps
each that take turns; its peak is the whole training's, AdamW's states among it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from bench.machine import RESULTS, ROOT, machine
from bench.memory import forget_peak, resident
from bench.report import put

PAGE, STORED = ROOT / "docs" / "compat" / "README.md", RESULTS / "compat.json"
SIZES = {
    "vocab_size": 151_936,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
SEQUENCES, TOKENS = 4, 256


def make_model() -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **SIZES)).float()


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels: the second half)"""
    ids = torch.randint(0, SIZES["vocab_size"], (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : TOKENS // 2] = -100
    return ids, labels


def transformers_update(ours: bool) -> Callable[[], float]:
    from luffy_kernels.compat.transformers import patch, unpatch

    model, (ids, labels) = make_model(), make_batch()

    def update() -> float:
        (patch if ours else unpatch)(model)
        loss = model(ids, labels=labels).loss
        loss.backward()
        return loss.item()

    return update


def trl_update(ours: bool, outputs: tuple[str, ...] = ("log_probs", "entropy")) -> Callable[[], float]:
    from luffy_kernels.compat import trl
    from trl.trainer.utils import add_fused_lm_head

    model, (ids, labels) = make_model(), make_batch()
    add_fused_lm_head(model, temperature=0.7, outputs=outputs)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None]

    def update() -> float:
        (trl.apply if ours else trl.undo)()
        found = model(input_ids=ids, labels=labels, fused_lm_head=True)
        ratio = torch.exp(found.log_probs - found.log_probs.detach())
        loss = -(ratio * advantages * (labels[:, 1:] != -100)).sum() / (SEQUENCES * TOKENS / 2)
        loss.backward()
        return loss.item() + found.entropy.mean().item()

    return update


def liger_update(ours: bool) -> Callable[[], float]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    from luffy_kernels.compat import liger

    model, (ids, labels) = make_model(), make_batch()
    made = liger.LigerFusedLinearGRPOLoss if ours else LigerFusedLinearGRPOLoss
    loss_of = made(beta=0.04, compiled=False)
    mask, advantages = (labels[:, 1:] != -100).float(), torch.tensor([1.0, -1.0, 0.5, -0.5])
    old = torch.full(mask.shape, -11.9)

    def update() -> float:
        hidden = model.model(ids).last_hidden_state[:, :-1]
        weight, tokens = model.lm_head.weight, ids[:, 1:].contiguous()
        loss, _ = loss_of(
            hidden, weight, tokens, mask, advantages, ref_per_token_logps=old, old_per_token_logps=old
        )  # fmt: skip
        loss.backward()
        return loss.item()

    return update


UPDATES = {
    "transformers": transformers_update,
    "TRL (GRPO)": trl_update,
    "TRL (SFT)": lambda ours: trl_update(ours, ("log_probs", "entropy", "is_top1")),
    "Liger (GRPO)": liger_update,
}


def trainer(ours: bool) -> dict[str, float]:
    """Four steps of TRL's GRPOTrainer: ms of an update (the median without the first), peak MiB beyond the start."""
    from datasets import Dataset
    from luffy_kernels.compat import trl
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    if ours:
        trl.apply()
    words = Tokenizer(models.WordLevel({f"w{at}": at for at in range(SIZES["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2")
    model, spent = make_model(), []
    before = resident("VmRSS")

    class Timed(GRPOTrainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            made = super()._prepare_inputs(inputs)
            spent.append(time.perf_counter())
            return made

        def training_step(self, *args: Any, **options: Any) -> Any:
            loss = super().training_step(*args, **options)
            spent[-1] = time.perf_counter() - spent[-1]
            return loss

    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            folder, max_steps=4, per_device_train_batch_size=SEQUENCES, num_generations=SEQUENCES, beta=0.0,
            max_completion_length=TOKENS // 4, report_to="none", bf16=False, use_cpu=True, save_strategy="no",
        )  # fmt: skip
        rows = Dataset.from_dict({"prompt": [" ".join(f"w{at + 3}" for at in range(TOKENS // 2))] * 32})
        rewards = [lambda completions, **_: [float(at) for at in range(len(completions))]]
        Timed(model, reward_funcs=rewards, args=args, train_dataset=rows, processing_class=tokenizer).train()
    return {"ms": 1e3 * median(spent[1:]), "peak_mib": (resident("VmHWM") - before) / 2**20}


def peak(framework: str, ours: bool) -> float:
    """MiB, in a fresh process."""
    command = [sys.executable, "-m", "bench.compat", "--memory", framework, *(["--ours"] if ours else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def trainers(rounds: int) -> dict[str, Any]:
    every: list[list[dict[str, float]]] = [[], []]
    for _ in range(rounds):
        for ours in (False, True):
            command = [sys.executable, "-m", "bench.compat", "--trainer", *(["--ours"] if ours else [])]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            every[ours].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        "ms": [round(median(one["ms"] for one in side), 1) for side in every],
        "ratio": round(median(a["ms"] / b["ms"] for a, b in zip(*every, strict=True)), 2),
        "peak_mib": [round(median(one["peak_mib"] for one in side)) for side in every],
    }


def measure(rounds: int) -> dict[str, Any]:
    found = {}
    for framework in UPDATES:
        updates = [UPDATES[framework](ours) for ours in (False, True)]
        values = [update() for update in updates]
        times: list[list[float]] = [[], []]
        for _ in range(rounds):
            for update, spent in zip(updates, times, strict=True):
                began = time.perf_counter()
                update()
                spent.append(time.perf_counter() - began)
        found[framework] = {
            "ms": [round(1e3 * median(spent), 1) for spent in times],
            "ratio": round(median(a / b for a, b in zip(*times, strict=True)), 2),
            "peak_mib": [round(peak(framework, ours)) for ours in (False, True)],
            "values": values,
        }
    found["GRPOTrainer"] = trainers(min(rounds, 3))
    return {"machine": machine(), "rounds": rounds, "frameworks": found}


def table(found: dict[str, Any]) -> str:
    lines = [
        "| an update in | its own, ms | ours | times as fast | its own peak, MiB | ours |",
        "|---|---:" + "|---:" * 4 + "|",
    ]
    for name, row in found["frameworks"].items():
        (theirs, ours), (their_peak, our_peak) = row["ms"], row["peak_mib"]
        lines.append(f"| {name} | {theirs:,.0f} | {ours:,.0f} | {row['ratio']:.2f} | {their_peak:,} | {our_peak:,} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--store", action="store_true", help="keep it in bench/results, and in docs/compat/README.md")
    parser.add_argument("--memory", choices=UPDATES, help=argparse.SUPPRESS)
    parser.add_argument("--trainer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        update = UPDATES[args.memory](args.ours)
        before = resident("VmRSS")
        forget_peak()
        update()
        print((resident("VmHWM") - before) / 2**20)
        return 0
    if args.trainer:
        print(json.dumps(trainer(args.ours)))
        return 0
    found = measure(args.rounds)
    print(table(found))
    if args.store:
        STORED.write_text(json.dumps(found, indent=1) + "\n")
        put(PAGE, "saved", table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
