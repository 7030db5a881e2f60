"""Baselines differ from LUFFY's recipe in what they are about alone, and SFT has none of the published defects."""

import pytest
import torch
from test_normalisation import Recording, uneven
from test_packing import tiny_lm
from tiny import make_tokenizer

from luffy import distributed, plan
from luffy.config import MeshConfig, config_of
from luffy.config_file import load_stages
from luffy.machines import find_machine
from luffy.model import Policy
from luffy.prompts import LUFFY_SYSTEM, PromptTemplate
from luffy.run_folder import _differences
from luffy.setup import Trainer
from luffy.shapes import find_shape
from luffy.train import micro_batches, split, update

MODEL = "qwen2.5-math-7b"
SCHEDULE = {"optim.lr", "optim.warmup_steps", "optim.schedule", "train.steps", "train.prompts_per_step"}
SFT = SCHEDULE | {"train.updates_per_step", "eval.every", "checkpoint.every"}
PROMPTED = {"model.prompt_style", "model.system", "model.chat_template", "model.eos_token", "reward.grader"}
ZERO = PROMPTED | {"rollout.max_tokens", "train.updates_per_step", "eval.temperature", "eval.max_tokens"}
# Recipe -> of each of its stages, the keys in which it differs from LUFFY's, objective and name apart.
DIFFER: dict[str, list[set[str]]] = {
    "on-policy": [set()],
    "rl-sft": [set()],
    "exgrpo": [{"train.steps"}],
    "sft": [SFT],
    "sft-then-rl": [SFT, {"data.path"}],
    "oat-zero": [ZERO],
    "open-reasoner-zero": [ZERO - {"eval.max_tokens"} | {"rollout.memory_fraction", "optim.warmup_steps"}],
    "prime-zero": [
        ZERO
        | {"model.reference_on_cpu", "rollout.refill", "rollout.memory_fraction", "optim.lr", "train.prompts_per_step"}
    ],
    "simplerl-zero": [
        ZERO | {"model.reference_on_cpu", "optim.lr", "train.steps", "train.prompts_per_step", "checkpoint.every"}
    ],
}


def stages(name: str) -> list:
    return load_stages(f"{name}-{MODEL}")


@pytest.mark.parametrize("name", DIFFER)
def test_a_baseline_differs_from_luffy_in_nothing_but_what_it_is_about(name):
    [luffy] = stages("luffy")
    for stage, keys in zip(stages(name), DIFFER[name], strict=True):
        changed = _differences(luffy.model_dump(), stage.model_dump())
        assert {key for key in changed if key != "name" and not key.startswith("objective.")} == keys


def test_the_published_settings():
    [on_policy], [rl_sft], [sft] = stages("on-policy"), stages("rl-sft"), stages("sft")
    first, second = stages("sft-then-rl")
    shared = (65536.0, 0.001, False)
    for one in (on_policy.objective, rl_sft.objective, second.objective):
        assert (one.normalizer, one.entropy_coef, one.advantage_std) == shared
    assert (on_policy.objective.sampled, on_policy.objective.shown) == (8, 0)
    assert (on_policy.objective.clip_low, on_policy.objective.clip_high) == (0.2, 0.2)
    assert (rl_sft.objective.sampled, rl_sft.objective.shown, rl_sft.objective.coef) == (7, 1, 1.0)
    assert (rl_sft.objective.clip_low, rl_sft.objective.clip_high) == (None, None)
    [exgrpo] = stages("exgrpo")
    assert (exgrpo.objective.normalizer, exgrpo.objective.entropy_coef, exgrpo.objective.advantage_std) == shared
    assert (exgrpo.objective.replayed, exgrpo.objective.start, exgrpo.objective.beta) == (0.5, 0.35, 0.1)
    assert (sft.optim.lr, sft.train.prompts_per_step, sft.objective.trace_filter) == (5e-5, 64, False)
    assert sft.train.steps * sft.train.prompts_per_step == pytest.approx(3 * 45_000, rel=1e-3)
    assert sft.optim.warmup_steps == sft.train.steps // 10
    assert first.model_dump(exclude={"name"}) == sft.model_dump(exclude={"name"})
    assert second.objective == on_policy.objective
    assert (second.optim, second.train) == (on_policy.optim, on_policy.train)


def rendered(name: str) -> str:
    """The prompt of a problem as the recipe of this name writes it, the data's system turn being LUFFY's."""
    [config] = stages(name)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = config.model.chat_template
    tokenizer.eos_token = config.model.eos_token
    template = PromptTemplate(tokenizer, style=config.model.prompt_style, system=config.model.system)
    return template.render([{"role": "system", "content": LUFFY_SYSTEM}, {"role": "user", "content": "1+1?"}])


def test_oat_zero_is_dr_grpo_with_the_qwen_math_template():
    [oat] = stages("oat-zero")
    o = oat.objective
    assert (o.name, o.rows, o.advantage_std, o.entropy_coef, o.clip_low, o.clip_high) == (
        "dr_grpo",
        8,
        False,
        0,
        0.2,
        0.2,
    )
    answers = oat.train.prompts_per_step * o.rows // oat.train.updates_per_step
    assert (answers, o.normalizer) == (128, 128 * oat.rollout.max_tokens)
    assert rendered("oat-zero") == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_simplerl_zero_is_grpo_with_a_small_kl_term():
    [simple] = stages("simplerl-zero")
    o = simple.objective
    assert (o.name, o.rows, o.advantage_std, o.normalizer, o.networks) == ("grpo", 8, True, "tokens", ("reference",))
    assert (o.kl_coef, o.entropy_coef, simple.optim.lr) == (1e-4, 1e-3, 5e-7)
    assert (simple.train.prompts_per_step, simple.train.updates_per_step) == (1024, 4)
    assert rendered("simplerl-zero") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n1+1?\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_open_reasoner_zero_is_ppo_that_discounts_nothing():
    [orz] = stages("open-reasoner-zero")
    o = orz.objective
    assert (o.name, o.rows, o.discount, o.gae_lambda, o.kl_coef, o.entropy_coef) == ("ppo", 64, 1, 1, 0, 0)
    assert (o.networks, o.value_lr, o.value_updates, o.normalise) == (("value",), 5e-6, 12, True)
    assert (orz.train.prompts_per_step, orz.train.updates_per_step, orz.optim.warmup_steps) == (128, 1, 50)
    prompt = rendered("open-reasoner-zero")
    assert prompt.startswith("A conversation between User and Assistant. The User asks")
    assert prompt.endswith("by the \\boxed{} tag.\nThis is the problem:\n1+1?\nAssistant: <think>")


def test_prime_zero_learns_process_rewards_online():
    [prime] = stages("prime-zero")
    o = prime.objective
    assert (o.name, o.rows, o.beta, o.networks) == ("prime", 4, 0.05, ("reference", "implicit_reward"))
    assert (o.accuracy_low, o.accuracy_high, o.process_coef / o.outcome_coef) == (0.2, 0.8, 1)
    assert (prime.optim.lr, o.reward_lr, o.reward_max_grad_norm) == (5e-7, 1e-6, 10)
    assert (prime.train.prompts_per_step, prime.train.updates_per_step, prime.rollout.max_tokens) == (64, 1, 3072)
    prompt = rendered("prime-zero")
    assert prompt.startswith("A conversation between User and Assistant. The user asks")
    assert prompt.endswith("User: 1+1?\n\nPresent the answer in LaTex format: \\boxed{Your answer}. Assistant:")


@pytest.mark.parametrize("name", DIFFER)
def test_every_stage_fits_on_the_gpus_it_is_meant_for(name):
    for config in stages(name):
        asked = plan.ask(config, find_shape(config.model.name), find_machine("h100"), 8, None, None)
        assert plan.answer(asked)[0].fits


def test_sft_is_one_mean_over_the_tokens_of_the_update():
    """Of micro-batches of unequal length: neither the mean of their means nor the first one's gradient is it."""
    config = config_of("sft")()
    config.optim.max_grad_norm, config.train.tokens_per_micro = 1e9, 30
    policy = Policy(tiny_lm().train(), 1.0)
    optimizer = Recording(policy.parameters(), lr=0.0)
    t = Trainer.bare(config, distributed.start(MeshConfig()), policy, optimizer)
    parts = split(t, uneven(), 0.0)
    lengths = [micro.num_targets for micro in micro_batches(t, parts[0])]
    assert len(lengths) > 4
    assert max(lengths) > 2 * min(lengths)
    metrics = update(t, parts, {"step": 1, "updates": 0, "bad_in_a_row": 0})

    lm = tiny_lm().double()
    lm.set_attn_implementation("sdpa")
    rows = [(group.example.prompt_ids, row.token_ids) for group in uneven() for row in group.rows]
    nll = []
    for prompt, answer in rows:
        logits = lm(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        nll.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
    loss = torch.stack(nll).sum() / sum(len(answer) for _, answer in rows)
    expected = torch.autograd.grad(loss, list(lm.parameters()))
    assert metrics.result()["actor/loss"] == pytest.approx(loss.item(), rel=1e-6)
    for found, true in zip(optimizer.seen, expected, strict=True):
        assert (found.double() - true).abs().max() <= 1e-4 * true.abs().max()
