"""Less memory for activations changes no gradient, and does recompute what it says."""

import pytest
import torch
from test_packing import GROUPS, tiny_lm
from torch.utils.flop_counter import FlopCounterMode

from luffy import activations
from luffy.config import Config, ModelConfig
from luffy.errors import UserError
from luffy.model import Policy
from luffy.packing import pack


def gradients(**options) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of the summed log-probs, and the FLOP of the backward pass."""
    config = ModelConfig(**options)
    lm = tiny_lm().train()
    activations.apply(lm, config)
    policy = Policy(lm, 1.0, config.offload_activations)
    [micro] = pack(GROUPS, lambda g: g.rows, 1000)
    total = policy(micro).sum()
    with FlopCounterMode(display=False) as counter:
        total.backward()
    return {name: p.grad for name, p in lm.named_parameters()}, counter.get_total_flops()


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": "selective"},
        {"gradient_checkpointing": True, "offload_activations": True},
        {"mlp_tokens": 5},
        {"gradient_checkpointing": True, "mlp_tokens": 7},
    ],
)
def test_gradients_are_the_same(options):
    want, _ = gradients()
    got, _ = gradients(**options)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, atol=1e-5, rtol=1e-5)


def test_blocks_are_recomputed_products_only_when_all_is():
    plain, whole, products = (gradients(gradient_checkpointing=how)[1] for how in (False, True, "selective"))
    assert plain == products  # what lies between products has no FLOP here
    assert whole > 1.2 * plain
    tiled = gradients(mlp_tokens=5)[1]
    assert plain < tiled < whole


def test_an_mlp_in_pieces_never_holds_the_whole():
    mlp = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.SiLU(), torch.nn.Linear(64, 8))
    widest = []
    mlp[0].register_forward_hook(lambda _m, _i, out: widest.append(out.shape[1]))
    x = torch.randn(1, 23, 8, requires_grad=True)
    out = activations.tiled(mlp.forward, 5)(x)
    torch.testing.assert_close(out, mlp.forward(x))
    out.sum().backward()
    assert sorted(widest, reverse=True) == [23, *[5] * 8, 3, 3]  # the check's own, then forward and backward
    with torch.no_grad():
        assert activations.tiled(mlp.forward, 5)(x).shape == x.shape


def test_checkpointing_saves_less_than_none():
    def saved(how) -> int:
        lm = tiny_lm().train()
        activations.apply(lm, ModelConfig(gradient_checkpointing=how))
        [micro] = pack(GROUPS, lambda g: g.rows, 1000)
        storages: dict[int, int] = {}

        def pack_hook(x: torch.Tensor) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda x: x):
            Policy(lm, 1.0)(micro)
        return sum(storages.values())

    assert saved(True) < saved(False)


def test_what_cannot_be_cut_or_offloaded_is_named():
    lm = tiny_lm()
    del lm.model.layers[0].mlp
    with pytest.raises(UserError, match=r"model.mlp_tokens: LlamaDecoderLayer has no `mlp`"):
        activations.apply(lm, ModelConfig(mlp_tokens=4))
    with pytest.raises(ValueError, match="offload_activations needs model.gradient_checkpointing = true"):
        Config(model=ModelConfig(offload_activations=True))
