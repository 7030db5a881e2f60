"""The adapters against the frameworks themselves, or against their published semantics."""

import inspect
import warnings
from copy import deepcopy as copy_of
from dataclasses import replace

import pytest
import torch
from luffy_kernels.compat import _patch
from luffy_kernels.compat import liger as our_liger
from luffy_kernels.compat import openrlhf as our_openrlhf
from luffy_kernels.compat import verl as our_verl
from luffy_kernels.compat.transformers import head_options, patch, token_logprobs, unpatch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 0.5},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "phi": {},  # its head has a bias
}


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES | FAMILIES[name])).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # logits that differ from one another
    return model.eval()


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, SIZES["vocab_size"], (3, 17), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[2, 10:] = -100
    mask = torch.ones_like(ids)
    mask[2, 12:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [None, 21])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_patched_model_has_the_loss_and_gradients_of_its_own(name, items):
    model, inputs = make(name), batch() | ({} if items is None else {"num_items_in_batch": items})
    theirs = model(**inputs)
    expected = gradients(model, theirs.loss)
    forward = model.forward
    assert patch(patch(model)) is model  # twice is once
    ours = model(**inputs)
    assert ours.logits is None
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    found = gradients(model, ours.loss)
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=2e-4, atol=2e-6, msg=key)
    without = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    assert torch.equal(model(**without).logits, theirs.logits)
    assert model(**inputs, return_dict=False)[0].item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    unpatch(unpatch(model))
    assert model.forward == forward
    assert model.forward.__func__ is type(model).forward


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi"])
def test_log_probs_of_tokens(name):
    model, inputs = make(name), batch()
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1] / 0.7
    logp = logits.log_softmax(-1)
    ignore = inputs["labels"] == -100
    found = token_logprobs(
        model,
        inputs["input_ids"],
        temperature=0.7,
        return_entropy=True,
        ignore=ignore,
        attention_mask=inputs["attention_mask"],
    )
    expected = logp.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1).masked_fill(ignore[:, 1:], 0)
    torch.testing.assert_close(found.logp, expected, rtol=1e-4, atol=1e-5)
    entropy = -(logp.exp() * logp).sum(-1).masked_fill(ignore[:, 1:], 0)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_patched_is_named_and_left():
    bare = make("llama").model
    with pytest.raises(ValueError, match=r"LlamaModel has no output embedding"):
        patch(bare)
    model = make("llama")
    peft = pytest.importorskip("peft", reason="needs peft")
    adapted = peft.get_peft_model(make("qwen2"), peft.LoraConfig(target_modules=["lm_head"], r=2)).get_base_model()
    with pytest.raises(ValueError, match=r"lm_head of Qwen2ForCausalLM.*adapter.*merge it"):
        patch(adapted)

    class Quantised(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden.round())

    model.lm_head.__class__ = Quantised
    with pytest.raises(ValueError, match=r"lm_head of LlamaForCausalLM must be a plain nn.Linear.*quantised"):
        patch(model)
    strange = make("llama")
    forward = type(strange).forward
    strange.register_forward_hook(lambda module, args, output: replace(output, logits=output.logits + 1))
    with pytest.raises(ValueError, match="logits of LlamaForCausalLM differ"):
        patch(strange)
    assert strange.forward.__func__ is forward


def test_a_loss_that_is_another_is_refused():
    """BART's decoder shifts no labels; and a model may have a loss function of its own."""
    from transformers import BartConfig, BartForCausalLM

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "decoder_attention_heads": 2, "vocab_size": 96}
    bart = BartForCausalLM(BartConfig(**sizes, decoder_ffn_dim=48, is_decoder=True, is_encoder_decoder=False)).eval()
    with torch.no_grad():
        for parameter in bart.parameters():
            parameter.mul_(3)
    with pytest.raises(ValueError, match="loss of BartForCausalLM is .* shifts labels in another way"):
        patch(bart)
    own = make("llama")
    own.loss_function = lambda *_, **__: torch.tensor(42.0)
    with pytest.raises(ValueError, match=r"loss of LlamaForCausalLM is 42"):
        patch(own)
    assert type(own).__name__ == "LlamaForCausalLM"
    assert patch(own, check=False) is own


def test_copies_and_replicas_run_on_themselves():
    model, inputs = patch(make("qwen2")), batch()
    without = {"input_ids": inputs["input_ids"]}
    copy = copy_of(model)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert not copy(**without).logits.any()
    assert model(**without).logits.any()
    replica = model._replicate_for_data_parallel()
    assert replica.forward.__self__ is replica
    assert type(unpatch(copy)) is type(make("qwen2"))


def test_a_model_is_patched_in_one_way_at_a_time():
    model = patch(make("llama"))
    with pytest.raises(ValueError, match="is patched for its loss"):
        our_openrlhf.without_logits(model)
    our_openrlhf.without_logits(unpatch(model))
    with pytest.raises(ValueError, match="is patched for its logits"):
        patch(model)


def test_what_a_model_was_stays():
    """Its modules' modes, its signature, and calls that want some logits."""
    model = make("qwen2").train()
    model.model.layers[0].eval()
    names = list(inspect.signature(model.forward).parameters)
    patch(model)
    assert [module.training for module in model.model.layers] == [False, True]
    assert list(inspect.signature(model.forward).parameters) == names
    model.eval()
    inputs = batch()
    some = model(inputs["input_ids"], labels=inputs["labels"][:, -4:], logits_to_keep=4)
    assert some.logits.shape[1] == 4
    positional = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"].int())
    assert positional.logits is None
    own = unpatch(model)(**inputs).loss
    assert positional.loss.item() == pytest.approx(own.item(), rel=1e-5)


def test_pictures_are_seen():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(**SIZES)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    seeing = CLIPVisionConfig(**vision, image_size=16, patch_size=8, projection_dim=32)
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=seeing, image_token_id=3, image_seq_length=4)
    model = LlavaForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    ids = torch.randint(5, 90, (2, 9))
    ids[:, 1:5] = 3
    asked = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16) * 3}
    own = model(**asked, labels=ids).loss.item()
    assert patch(model)(**asked, labels=ids).loss.item() == pytest.approx(own, rel=1e-5)
    pictures = asked.pop("pixel_values")
    seen, blind = (token_logprobs(model, **asked, pixel_values=x).logp for x in (pictures, 0 * pictures))
    assert not torch.allclose(seen, blind)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_transformers_trainer_trains_a_patched_model(options, tmp_path):
    pytest.importorskip("accelerate", reason="needs accelerate")
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(3, SIZES["vocab_size"], (16, 9), generator=torch.Generator().manual_seed(1)).tolist()
    rows = Dataset.from_list([{"input_ids": row, "labels": row, "more": "x"} for row in ids])

    def losses(model) -> list[float]:
        torch.manual_seed(0)
        given = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": [], "use_cpu": True}
        args = TrainingArguments(str(tmp_path), save_strategy="no", disable_tqdm=True, **given | options)
        trainer = Trainer(model, args=args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return [*found, trainer.evaluate()["eval_loss"]]

    theirs, ours = losses(make("qwen2")), losses(patch(make("qwen2")))
    assert ours == pytest.approx(theirs, rel=3e-2 if options.get("bf16") else 1e-4)


def test_autocast_reaches_the_head():
    model, inputs = make("llama"), batch()
    exact = patch(model)(**inputs).loss
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**inputs).loss
        logp = token_logprobs(model, inputs["input_ids"].int()).logp
    assert 0 < abs(rounded - exact) < 0.05 * exact
    assert logp.dtype == torch.float32


def test_lora_on_other_modules_is_trained_by_a_patched_model():
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(make("qwen2"), config)
    expected = gradients(model, model(**batch()).loss)
    patch(model.get_base_model())
    found = gradients(model, model(**batch()).loss)
    assert found.keys() == expected.keys() != set()
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=2e-4, atol=2e-6, msg=key)


def test_gradient_checkpointing_changes_nothing():
    model = make("qwen2").train()
    expected = gradients(model, model(**batch()).loss)
    patch(model).gradient_checkpointing_enable()
    found = gradients(model, model(**batch()).loss)
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=2e-4, atol=2e-6, msg=key)


def test_head_options_of_families():
    def of(**values):
        return head_options(type("Config", (), values)())

    assert of() == {"softcap": None, "logit_scale": 1.0}
    assert of(logit_scale=0.0625)["logit_scale"] == 0.0625
    assert of(lm_head_multiplier=0.04)["logit_scale"] == 0.04
    assert of(logits_scaling=8.0)["logit_scale"] == 0.125
    assert of(logits_scaling=8.0, model_type="hyperclovax")["logit_scale"] == 8.0
    assert of(final_logit_softcapping=30.0)["softcap"] == 30.0


# --- Liger -----------------------------------------------------------------------------------------------------------

B, T, H, V = 3, 11, 24, 130


def grpo_inputs(seed: int = 0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=rng, dtype=torch.float64) * scale).to(dtype)

    mask = torch.ones(B, T)
    mask[0, 7:] = 0
    mask[2, 3:] = 0
    return {
        "_input": normal(B, T, H),
        "lin_weight": normal(V, H, scale=0.4),
        "selected_token_ids": torch.randint(0, V, (B, T), generator=rng),
        "attention_mask": mask,
        "advantages": normal(B),
        "bias": normal(V, scale=0.1),
    }


GRPO = [
    {"loss_type": "dapo"},
    {"loss_type": "grpo", "beta": 0.0},
    {"loss_type": "bnpo", "epsilon_low": 0.1, "epsilon_high": 0.3},
    {"loss_type": "dr_grpo", "max_completion_length": 20},
    {"loss_type": "luspo"},
    {"loss_type": "cispo", "epsilon_high": 1.3},
    {"loss_type": "cispo", "epsilon_high": 0.9},
    {"loss_type": "sapo", "sapo_temperature_neg": 1.4},
    {"loss_type": "vespo"},
    {"loss_type": "grpo", "delta": 1.5, "epsilon_high": 0.2},
    {"loss_type": "dapo", "delta": 1.1, "epsilon_high": 0.2},
    {"loss_type": "dapo", "delta": 0.9},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "dapo", "use_bias_correction_kl": True},
    {"loss_type": "dapo", "temperature": 0.7, "beta": 0.3},
]


def outcome(module, inputs, **more):
    """(loss, metrics, gradients of input, weight and bias)"""
    leaves = [inputs[name].detach().clone().requires_grad_() for name in ("_input", "lin_weight", "bias")]
    given = inputs | dict(zip(("_input", "lin_weight", "bias"), leaves, strict=True))
    loss, metrics = module(**given, **more)
    return loss.detach(), metrics, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("is_ratio", [False, True])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("options", GRPO, ids=lambda options: "-".join(map(str, options.values())))
def test_grpo_as_liger_has_it(options, old, is_ratio):
    """Values and gradients against Liger's own formulas in float64; ours are at least as close as its float32."""
    grpo = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="needs liger-kernel")
    inputs, rng = grpo_inputs(), torch.Generator().manual_seed(7)
    if options["loss_type"] == "luspo":  # Liger's has a share of padding
        inputs["attention_mask"] = torch.ones(B, T)
    more = {"ref_per_token_logps": torch.randn(B, T, generator=rng) * 0.3 - 4.5}
    if old:
        more["old_per_token_logps"] = torch.randn(B, T, generator=rng) * 0.5 - 4.8
    if is_ratio:
        more["vllm_is_ratio"] = torch.rand(B, T, generator=rng) + 0.5
    if options["loss_type"] in ("dapo", "cispo"):
        more["num_items_in_batch"] = 31
    ours = outcome(our_liger.LigerFusedLinearGRPOLoss(**options), inputs, **more)
    theirs = outcome(grpo.LigerFusedLinearGRPOLoss(compiled=False, **options), inputs, **more)

    def exact(_input, lin_weight, selected_token_ids, attention_mask, advantages, bias, **given):
        settings = {"beta": 0.04, "loss_type": "dapo"} | options
        logits = (_input @ lin_weight.T + bias) / settings.pop("temperature", 1.0)
        logp = logits.log_softmax(-1).gather(-1, selected_token_ids[..., None]).squeeze(-1)
        given = {key: value.double() if torch.is_tensor(value) else value for key, value in given.items()}
        formula = grpo.LigerFusedLinearGRPOFunction.ppo_loss_fn
        return formula(logp, attention_mask, advantages, attention_mask, **given, **settings)

    doubled = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    truth = outcome(exact, doubled, **more)
    assert len(ours[1]) == len(truth[1])
    for mine, right in zip(ours[1], truth[1], strict=True):
        assert mine.item() == pytest.approx(right.item(), rel=1e-5, abs=1e-6)
    assert float(ours[0]) == pytest.approx(float(truth[0]), rel=2e-6, abs=1e-6)
    for mine, other, right in zip(ours[2], theirs[2], truth[2], strict=True):
        scale = right.abs().max()
        error, their_error = ((grad.double() - right).abs().max() / scale for grad in (mine, other))
        assert error <= max(1.5 * their_error, 2e-6)


@pytest.mark.parametrize("options", GRPO, ids=lambda options: "-".join(map(str, options.values())))
def test_padding_has_no_part_in_a_loss(options):
    pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="needs liger-kernel")
    module, inputs = our_liger.LigerFusedLinearGRPOLoss(**options), grpo_inputs()
    more = {"ref_per_token_logps": torch.full((B, T), -4.5), "old_per_token_logps": torch.full((B, T), -4.8)}
    padding = inputs["attention_mask"] == 0
    loss, _, (grad, *_) = outcome(module, inputs, **more)
    assert not grad[padding].any()
    other = inputs | {"_input": inputs["_input"].masked_fill(padding[..., None], 3.0)}
    assert outcome(module, other, **more)[0] == loss


def test_cross_entropy_as_liger_has_it():
    liger = pytest.importorskip("liger_kernel.transformers", reason="needs liger-kernel")
    theirs, ours = liger.LigerFusedLinearCrossEntropyLoss, our_liger.LigerFusedLinearCrossEntropyLoss
    assert inspect.signature(ours.__init__).parameters.keys() == inspect.signature(theirs.__init__).parameters.keys()
    assert list(inspect.signature(ours.forward).parameters) == list(inspect.signature(theirs.forward).parameters)
    inputs = grpo_inputs(dtype=torch.float64)
    hidden, target = inputs["_input"].reshape(-1, H), inputs["selected_token_ids"].reshape(-1)
    target[3] = -100
    logits = hidden @ inputs["lin_weight"].T + inputs["bias"]
    every = ({}, {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.1, "softcap": 5.0})
    for options in every:
        found = ours(**options)(inputs["lin_weight"], hidden, target.int(), inputs["bias"])
        z = logits if "softcap" not in options else 5.0 * torch.tanh(logits / 5.0)
        reduction, smoothing = options.get("reduction", "mean"), options.get("label_smoothing", 0.0)
        expected = torch.nn.functional.cross_entropy(z, target, reduction=reduction, label_smoothing=smoothing)
        torch.testing.assert_close(found, expected)
    found = ours(lse_square_scale=0.1)(inputs["lin_weight"], hidden, target, inputs["bias"])
    valid = target != -100
    penalty = 0.1 * logits.logsumexp(-1).square()[valid].mean()
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, target) + penalty)
    for name in ("return_z_loss", "return_token_accuracy", "use_token_scaling"):
        with pytest.raises(ValueError, match=name):
            ours(**{name: True})


def test_a_reference_model_as_liger_has_it():
    """By its own hidden states, weight and bias; left out where none is wanted; and never silently missing."""
    grpo = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="needs liger-kernel")
    inputs, rng = grpo_inputs(), torch.Generator().manual_seed(8)
    reference = {
        "ref_input": torch.randn(B, T, H, generator=rng),
        "ref_weight": inputs["lin_weight"] + 0.1 * torch.randn(inputs["lin_weight"].shape, generator=rng),
        "ref_bias": torch.randn(inputs["bias"].shape, generator=rng),
    }
    for options in ({"beta": 0.3}, {"beta": 0.3, "use_ref_model": False}, {"beta": 0.0}):
        ours = outcome(our_liger.LigerFusedLinearGRPOLoss(**options), inputs, **reference)
        theirs = outcome(grpo.LigerFusedLinearGRPOLoss(compiled=False, **options), inputs, **reference)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    given = {"ref_per_token_logps": torch.full((B, T), -4.5)}
    without = our_liger.LigerFusedLinearGRPOLoss(beta=0.3, use_ref_model=False)
    assert outcome(without, inputs, **given)[0] == outcome(without, inputs)[0]
    with pytest.raises(ValueError, match="give ref_per_token_logps"):
        our_liger.LigerFusedLinearGRPOLoss(beta=0.3)(**inputs)


@pytest.mark.parametrize(
    "options", [{"epsilon_low": 0.0}, {"epsilon_high": 0.0}, {"loss_type": "bnpo", "epsilon_low": 0.0}]
)
def test_no_room_for_the_ratio_as_liger_has_it(options):
    grpo = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="needs liger-kernel")
    inputs, more = grpo_inputs(), {"old_per_token_logps": torch.full((B, T), -4.6)}
    options = options | {"beta": 0.0, "use_ref_model": False}
    ours = outcome(our_liger.LigerFusedLinearGRPOLoss(**options), inputs, **more)
    theirs = outcome(grpo.LigerFusedLinearGRPOLoss(compiled=False, **options), inputs, **more)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_grpo_has_ligers_signatures():
    grpo = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="needs liger-kernel")
    theirs, ours = grpo.LigerFusedLinearGRPOLoss, our_liger.LigerFusedLinearGRPOLoss
    for method in ("__init__", "forward"):
        mine, other = (inspect.signature(getattr(cls, method)).parameters for cls in (ours, theirs))
        assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in other.values()]


# --- verl ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_verls_linear_cross_entropy(reduction):
    """Positive log-probs of shifted labels, entropy by token, both with gradients."""
    inputs = grpo_inputs(dtype=torch.float64)
    hidden, weight = inputs["_input"].requires_grad_(), inputs["lin_weight"].requires_grad_()
    logp, entropy = our_verl.linear_cross_entropy(hidden, weight, inputs["selected_token_ids"], 0.7, reduction)
    log_p = (hidden @ weight.T / 0.7).log_softmax(-1)
    expected = log_p.gather(-1, inputs["selected_token_ids"][..., None]).reshape(-1)
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    right = -(log_p.exp() * log_p).sum(-1).reshape(-1)
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(entropy, right)
    assert entropy.shape == (B * T,)
    found = torch.autograd.grad(logp.sum() + 0.3 * entropy.square().sum(), (hidden, weight))
    truth = torch.autograd.grad(expected.sum() + 0.3 * right.square().sum(), (hidden, weight))
    torch.testing.assert_close(found, truth)


def test_verls_fused_linear():
    inputs = grpo_inputs()
    module, ids = our_verl.FusedLinearForPPO(chunk_size=4), inputs["selected_token_ids"]
    logp, entropy = module(inputs["_input"], inputs["lin_weight"], ids.int(), temperature=1.3)
    log_p = (inputs["_input"] @ inputs["lin_weight"].T / 1.3).log_softmax(-1)
    torch.testing.assert_close(logp, log_p.gather(-1, ids[..., None]).squeeze(-1))
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1))
    flat = module(inputs["_input"].reshape(-1, H), inputs["lin_weight"], ids.reshape(-1), temperature=1.3)
    torch.testing.assert_close(flat[0].view(B, T), logp)
    with pytest.raises(ValueError, match="reduction must be among none, sum, mean"):
        our_verl.linear_cross_entropy(inputs["_input"], inputs["lin_weight"], ids, 1.0, "max")


# --- OpenRLHF --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_actor_that_wants_logits_does_without(temperature):
    """In the order in which OpenRLHF 0.11's `Actor.forward` asks: float32, temperature, entropy, log-probs."""
    model, ids = make("gemma2"), batch()["input_ids"]
    theirs = [our_openrlhf._log_probs(None), our_openrlhf._entropy(None)]

    def actor(model):
        output = model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(17).expand(3, 17))
        output["logits"] = output["logits"].to(torch.float32)
        if temperature != 1.0:
            output["logits"].div_(temperature)
        return output["logits"]

    logits, labels = actor(model), ids.roll(-1, dims=1)
    logp = logits.log_softmax(-1)
    right = (logp.gather(-1, labels[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1))
    loss = (right[0].sum() + 0.3 * right[1].square().sum()) / 10
    expected = gradients(model, loss)
    lazy = actor(our_openrlhf.without_logits(our_openrlhf.without_logits(model)))
    assert lazy.shape == logits.shape
    entropy, found = theirs[1](lazy), theirs[0](lazy, labels)
    torch.testing.assert_close(found, right[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, right[1], rtol=1e-4, atol=1e-5)
    for key, grad in gradients(model, (found.sum() + 0.3 * entropy.square().sum()) / 10).items():
        torch.testing.assert_close(grad, expected[key], rtol=5e-4, atol=1e-5, msg=key)
    other = (labels + 1) % SIZES["vocab_size"]
    expected_of_others = logp.gather(-1, other[..., None]).squeeze(-1)
    torch.testing.assert_close(theirs[0](actor(model), other), expected_of_others, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="float32"):
        lazy.to(torch.bfloat16)
    unpatch(model)
    assert torch.is_tensor(actor(model))


def test_an_actors_head_is_the_one_it_has_now_and_gradients_come_when_wanted():
    model, ids = our_openrlhf.without_logits(make("llama")), batch()["input_ids"]
    lazy = model(ids).logits
    with torch.no_grad():
        assert not lazy.entropy.requires_grad
    assert lazy.log_probs(lazy.targets).requires_grad
    model.resize_token_embeddings(120)
    assert model(ids).logits.shape[-1] == 120


def test_openrlhfs_functions_stay_for_real_logits():
    seen = []
    of_logits = our_openrlhf._log_probs(lambda *given: seen.append(given))
    of_logits(torch.ones(2, 3), torch.ones(2).long(), 0.5)
    our_openrlhf._entropy(seen.append)(torch.zeros(2, 3))
    assert len(seen) == 2


# --- patches ---------------------------------------------------------------------------------------------------------


def test_a_patch_is_put_on_once_and_taken_off(monkeypatch):
    class Theirs:
        def work(self):
            return "theirs"

    original = Theirs.work
    one = _patch.Patch("torch", ("2.",), lambda: [(Theirs, "work", lambda self: "ours")])
    assert one.apply()
    assert one.apply()
    assert Theirs().work() == "ours"
    one.undo()
    one.undo()
    assert Theirs.work is original
    assert one.apply()
    Theirs.work = somebody = lambda self: "somebody's"
    one.undo()
    assert Theirs.work is somebody  # who came later stays
    Theirs.work = original
    unknown = _patch.Patch("torch", ("1.",), lambda: [(Theirs, "work", None)])
    with pytest.warns(RuntimeWarning, match=r"is written for torch 1\.\*, not 2.*left as it is") as caught:
        assert not unknown.apply()
    assert len(caught) == 1
    assert caught[0].filename == __file__  # it is whoever applies that is told
    changed = _patch.Patch("torch", ("2.",), lambda: [(Theirs, "work", None), (Theirs, "gone", None)])
    with pytest.warns(RuntimeWarning, match="does not find its way"):
        assert not changed.apply()
    assert Theirs.work is original
    with pytest.raises(ImportError, match="no-such-package is not installed"):
        _patch.Patch("no-such-package", ("1.",), list).apply()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unknown.undo()


def test_who_has_imported_it_already_gets_it_too(monkeypatch):
    import sys
    from types import ModuleType

    home, early, other = ModuleType("somewhere"), ModuleType("somewhere.early"), ModuleType("somewhereelse")
    for module in (home, early, other):
        module.work = original = home.work if hasattr(home, "work") else object()
        monkeypatch.setitem(sys.modules, module.__name__, module)
    ours = object()
    patch = _patch.Patch("torch", ("2.",), lambda: _patch.everywhere("somewhere", home, "work", ours))
    assert patch.apply()
    assert (home.work, early.work, other.work) == (ours, ours, original)
    patch.undo()
    assert home.work is early.work is original


@pytest.mark.parametrize("module", [our_verl, our_openrlhf])
def test_adapters_ask_for_their_package(module):
    """By the name under which it is installed; none of these is."""
    with pytest.raises(ImportError, match=f"{module.__name__.rpartition('.')[2]} is not installed"):
        module.apply()
    module.undo()
