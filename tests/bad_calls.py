"""Bad input of the kernels and of models that are patched, for test_bad_input_walk.py: calls that raise ValueError."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from bad_inputs import check_sentence
from luffy_kernels import linear_cross_entropy, linear_logprobs, linear_policy_loss, policy_gradient, shaped
from luffy_kernels.compat.transformers import patch, unpatch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from luffy import distributed
from luffy.config import MeshConfig

B, T, H, V = 2, 5, 32, 64
OPS = {op.__name__: op for op in (linear_logprobs, linear_policy_loss, linear_cross_entropy)}
POLICY = ("linear_policy_loss",)
NORMALISED = ("linear_policy_loss", "linear_cross_entropy")


class Told(NamedTuple):
    """What the sentence has to contain besides the op."""

    argument: str
    expected: str
    given: str


@dataclass(frozen=True, kw_only=True)
class BadCall:
    """error: as it is listed. change: of the arguments. ops: that have the argument."""

    error: str
    change: Callable[[dict[str, Any]], dict[str, Any]]
    says: Told
    ops: tuple[str, ...] = tuple(OPS)

    def provoke(self) -> None:
        for name in self.ops:
            arguments = arguments_of(name)
            kept = {key: value.clone() for key, value in arguments.items() if isinstance(value, Tensor)}
            with pytest.raises(ValueError, match=f"^{name}: ") as raised:
                OPS[name](**arguments | self.change(arguments))
            check_sentence(str(raised.value), self.says)
            assert all(torch.equal(arguments[key], value) for key, value in kept.items())


def arguments_of(op: str) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {
        "hidden": torch.randn(B, T, H, generator=random),
        "weight": torch.randn(V, H, generator=random),
        "targets": torch.randint(V, (B, T), generator=random),
    }
    if op in POLICY:
        found |= {"losses": (policy_gradient(0.2), shaped(0.1)), "loss_id": torch.zeros(B, T, dtype=torch.long)}
        found |= {"advantages": torch.ones(B, T), "old_logp": -torch.ones(B, T), "normalizer": 8.0}
    return found


def sharded(arguments: dict[str, Any]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (1,))
    return {"weight": distribute_tensor(arguments["weight"], mesh, [Shard(0)])}


class InAGroup(BadCall):
    """With a process group, of this process alone."""

    def provoke(self) -> None:
        distributed.start(MeshConfig())
        try:
            super().provoke()
        finally:
            distributed.close()


class OnAGpu(BadCall):
    def provoke(self) -> None:
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        super().provoke()


CALLS: list[BadCall] = [
    BadCall(
        error="shape mismatch of hidden",
        change=lambda a: {"hidden": a["hidden"][..., :-1]},
        says=Told("hidden", "[..., 32] to match weight", "(2, 5, 31)"),
    ),
    BadCall(
        error="shape mismatch of targets",
        change=lambda a: {"targets": a["targets"][:, 1:]},
        says=Told("targets", "(2, 5) to match hidden", "(2, 4)"),
    ),
    BadCall(
        error="wrong dtype of targets",
        change=lambda a: {"targets": a["targets"].int()},
        says=Told("targets", "int64", "torch.int32"),
    ),
    BadCall(
        error="wrong dtype of weight",
        change=lambda a: {"weight": a["weight"].long()},
        says=Told("weight", "bfloat16, float16, float32 or float64", "torch.int64"),
    ),
    BadCall(
        error="wrong device",
        change=lambda a: {"targets": a["targets"].to("meta")},
        says=Told("targets", "on cpu like hidden", "meta"),
    ),
    BadCall(
        error="wrong device of weight",
        change=lambda a: {"weight": a["weight"].to("meta")},
        says=Told("weight", "on cpu like hidden", "meta"),
    ),
    OnAGpu(
        error="wrong device, that of a GPU",
        change=lambda a: {"targets": a["targets"].cuda()},
        says=Told("targets", "on cpu like hidden", "cuda:0"),
    ),
    BadCall(
        error="target out of range",
        change=lambda a: {"targets": torch.full_like(a["targets"], V)},
        says=Told("targets", "in [0, 64) or -100", "got 64"),
    ),
    BadCall(
        error="advantages that cannot broadcast",
        change=lambda a: {"advantages": torch.ones(B)},
        says=Told("advantages", "broadcastable to (2, 5), with as many dimensions", "(2,)"),
        ops=POLICY,
    ),
    BadCall(
        error="missing old_logp for a loss that needs it",
        change=lambda a: {"old_logp": None},
        says=Told("old_logp", "given (policy_gradient reads it)", "None"),
        ops=POLICY,
    ),
    BadCall(
        error="loss_id outside the table",
        change=lambda a: {"loss_id": a["loss_id"] + 2},
        says=Told("loss_id", "in [0, 2), the rows of losses", "got 2"),
        ops=POLICY,
    ),
    BadCall(
        error="non-positive temperature",
        change=lambda a: {"temperature": 0.0},
        says=Told("temperature", "positive and finite", "got 0.0"),
    ),
    BadCall(
        error="non-positive normaliser",
        change=lambda a: {"normalizer": -1.0},
        says=Told("normalizer", "positive and finite", "got -1.0"),
        ops=NORMALISED,
    ),
    InAGroup(
        error="a DTensor weight that is still sharded",
        change=sharded,
        says=Told("weight", "unsharded (call the op inside the FSDP root's forward, or full_tensor())", "a DTensor"),
    ),
    BadCall(
        error="backend asked for but not available",
        change=lambda a: {"backend": "cpp", "hidden": a["hidden"].double(), "weight": a["weight"].double()},
        says=Told("backend", "available", "float64"),
    ),
]

# --- models that are patched ------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True, kw_only=True)
class BadHead:
    """error: as it is listed. make: of the model. says: None where it works."""

    error: str
    make: Callable[[], torch.nn.Module]
    says: Told | None

    def provoke(self) -> None:
        model = self.make().eval()
        ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
        kept, kind, forward = deepcopy(model.state_dict()), type(model), model.forward
        if self.says is None:
            own, patched = model(ids, labels=ids), patch(model)(ids, labels=ids)
            torch.testing.assert_close(patched.loss, own.loss)
            assert own.logits is not None
            assert patched.logits is None  # or the patch did nothing
            assert type(model) is not kind
            unpatch(model)
        else:
            with pytest.raises(ValueError, match="^luffy_kernels: ") as raised:
                patch(model)
            check_sentence(str(raised.value), self.says)
        assert type(model) is kind
        assert model.forward == forward
        assert not differing(model.state_dict(), kept)


def differing(state: dict[str, Any], kept: dict[str, Any]) -> set[str]:
    """Names of what is not the same to the last bit. Quantised weights are tuples of tensors."""
    return set(state) ^ set(kept) | {
        name for name in set(state) & set(kept) if not all(map(same, *map(tree_leaves, (state[name], kept[name]))))
    }


def same(value: Any, other: Any) -> bool:
    return torch.equal(value, other) if isinstance(value, Tensor) else value == other


def causal(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES)).float()


class Bent(torch.nn.Linear):
    """No matrix alone."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).tanh()


def with_bent_head() -> Any:
    model = causal("llama")
    model.lm_head = Bent(32, 96, bias=False)
    return model


def with_quantised_head() -> Any:
    model = causal("llama")
    model.lm_head = torch.ao.nn.quantized.dynamic.Linear.from_float(prepared(model.lm_head))
    return model


def prepared(linear: torch.nn.Linear) -> torch.nn.Linear:
    linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return linear


def with_lora(**options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs peft")
    return peft.get_peft_model(causal("qwen2"), peft.LoraConfig(r=2, **options)).get_base_model()


HEADS = [
    BadHead(
        error="model without an output embedding",
        make=lambda: causal("llama").model,
        says=Told("LlamaModel", "logits to do without", "has no output embedding"),
    ),
    BadHead(error="model with a bias", make=lambda: causal("phi"), says=None),
    BadHead(
        error="model with a non-linear head",
        make=with_bent_head,
        says=Told("lm_head of LlamaForCausalLM", "must be a plain nn.Linear", "Bent is "),
    ),
    BadHead(
        error="quantised head",
        make=with_quantised_head,
        says=Told("lm_head of LlamaForCausalLM", "must be a plain nn.Linear", "is quantised"),
    ),
    BadHead(
        error="LoRA-wrapped head",
        make=lambda: with_lora(target_modules=["lm_head"]),
        says=Told("lm_head of Qwen2ForCausalLM", "must be a plain nn.Linear", "an adapter, whose share of the logits"),
    ),
    BadHead(
        error="LoRA-wrapped head, trained as a copy",
        make=lambda: with_lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        says=Told("lm_head of Qwen2ForCausalLM", "must be a plain nn.Linear", "a copy that is trained beside"),
    ),
    BadHead(error="LoRA-wrapped head: other modules", make=lambda: with_lora(target_modules=["q_proj"]), says=None),
]
