"""FLOP formulas against hand counts and torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from luffy.flops import attended_pairs, attention_weight, forward_flops, head_flops, mfu, step_flops, update_flops
from luffy.shapes import KNOWN, shape_of

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "tie_word_embeddings": True,
}


def model(kind: str = "llama", **more):
    config = AutoConfig.for_model(kind, **(SIZES | more))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float(), shape_of(config, kind)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_forward_and_update_equal_torchs_count(kind, frozen):
    lm, shape = model(kind)
    lm.requires_grad_(not frozen)
    tokens, targets = 11, 5
    # requires a gradient, as what comes out of an embedding or an adapter does: else the first block's would be spared
    embedded = torch.randn(1, tokens, 32, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        hidden = lm.model(inputs_embeds=embedded).last_hidden_state[0, :targets]
        loss = (hidden @ lm.lm_head.weight.T).sum()
    pairs = tokens * tokens  # eager attention multiplies masked pairs too
    want = forward_flops(shape, tokens, pairs) + head_flops(shape, targets)
    # transformers makes the angles of the rotation by a product, [D / 2, 1] x [1, T]
    angles = 2 * (shape.head_dim // 2) * tokens
    assert forward.get_total_flops() - want in (0, angles)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert want + backward.get_total_flops() == update_flops(shape, tokens, pairs, targets, frozen)


def test_hand_counts():
    shape = KNOWN["qwen2.5-7b"]
    # q and o: 3584 x 3584; k and v: 3584 x 512; gate, up, down: 3584 x 18944
    products = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    assert shape.block_matrices == products
    assert forward_flops(shape, 10, 0) == 28 * 2 * products * 10
    assert forward_flops(shape, 0, 7) == 28 * 4 * 3584 * 7
    assert head_flops(shape, 3) == 2 * 3584 * 152064 * 3
    assert update_flops(shape, 10, 55, 4) == 3 * (forward_flops(shape, 10, 55) + head_flops(shape, 4))
    assert step_flops(shape, 10, 55, 4, first_pass=False) == update_flops(shape, 10, 55, 4)
    assert step_flops(shape, 10, 55, 4, first_pass=True) == update_flops(shape, 10, 55, 4) * 4 // 3
    frozen = 2 * (forward_flops(shape, 10, 0) + head_flops(shape, 4)) + 3 * forward_flops(shape, 0, 55)
    assert update_flops(shape, 10, 55, 4, frozen=True) == frozen


def test_attended_pairs_are_those_of_the_mask():
    def by_mask(prompt, rows):
        owner = [0] * prompt + [k for k, n in enumerate(rows, 1) for _ in range(n)]
        return sum(q >= k and owner[k] in (0, owner[q]) for q in range(len(owner)) for k in range(len(owner)))

    for prompt, rows in ((5, []), (5, [3]), (4, [3, 1, 6]), (1, [1])):
        assert attended_pairs(prompt, rows) == by_mask(prompt, rows)
    assert attended_pairs(4, [3]) == attended_pairs(7, [])  # one row shares nothing


def test_the_weight_of_a_pair_is_its_share_of_a_tokens_work():
    shape = KNOWN["qwen2.5-0.5b"]
    one_token, one_pair = forward_flops(shape, 1, 0), forward_flops(shape, 0, 1)
    assert attention_weight(shape) == pytest.approx(one_pair / one_token)
    assert attention_weight(KNOWN["qwen2.5-72b"]) < attention_weight(shape)  # wider models spend less of it on pairs


def test_mfu():
    assert mfu(500e12, 1.0, 1000e12) == 0.5
    assert mfu(4000e12, 2.0, 1000e12, devices=8) == 0.25
    for seconds, peak, devices in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="must be positive"):
            mfu(1.0, seconds, peak, devices)
