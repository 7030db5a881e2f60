"""Attention over packed groups: every way of computing it gives each row what it would get alone."""

import sys
from types import ModuleType

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from luffy import varlen
from luffy.attention import Layout, Segment, packed_attention, per_row_attention

# a shared prompt with rows of 4, 1 and 0 tokens, a plain sequence, a prompt alone, another group
LAYOUT = [
    Segment(0, 3, [(3, 7), (7, 8), (8, 8)]),
    Segment(8, 10, [(10, 15)]),
    Segment(15, 17, []),
    Segment(17, 23, [(23, 24), (24, 26)]),
]
TOKENS = 26


def qkv(dtype=torch.float64, device="cpu", heads=4, kv_heads=2, dim=8):
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, heads, TOKENS, dim), (1, kv_heads, TOKENS, dim), (1, kv_heads, TOKENS, dim))
    made = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return [x.to(device, dtype).requires_grad_() for x in made]


def alone(q, k, v, scale):
    """Oracle: each prompt, and each prompt with each of its rows, as a sequence of its own; the row's part of it."""
    out = torch.zeros_like(q)
    for segment in LAYOUT:
        prompt = list(range(segment.start, segment.prompt_end))
        for begin, end in [(segment.start, segment.prompt_end), *segment.rows]:
            mine = list(range(begin, end))
            ids = mine if begin == segment.start else prompt + mine
            sequence = scaled_dot_product_attention(
                q[:, :, ids], k[:, :, ids], v[:, :, ids], is_causal=True, scale=scale, enable_gqa=True
            )
            if mine:
                out = out.index_copy(2, torch.tensor(mine, device=q.device), sequence[:, :, -len(mine) :])
    return out


def by_documented_rules(q, k, v, bounds: varlen.Bounds, scale):
    """What flash-attn documents of its varlen function: sequences apart, causal from the bottom right corner."""
    assert bounds.queries.dtype == bounds.keys.dtype == torch.int32
    assert bounds.queries[-1] == len(q)
    assert bounds.keys[-1] == len(k) == len(v)
    assert bounds.longest_queries == bounds.queries.diff().max()
    assert bounds.longest_keys == bounds.keys.diff().max()
    outputs = []
    for a, b, c, d in zip(bounds.queries, bounds.queries[1:], bounds.keys, bounds.keys[1:], strict=False):
        queries, keys, values = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril((d - c) - (b - a))
        out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def assert_same(attend, want, tensors, **tolerance):
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(want)
    expected = torch.autograd.grad(want, tensors, grad, retain_graph=True)
    got = attend(*tensors)
    torch.testing.assert_close(got, want, **tolerance)
    for ours, theirs in zip(torch.autograd.grad(got, tensors, grad.to(got)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("way", ["rows", "varlen"])
def test_each_row_gets_what_it_would_get_alone(way, scale):
    tensors, layout = qkv(), Layout(LAYOUT, TOKENS)

    def attend(q, k, v):
        if way == "rows":
            return per_row_attention(q, k, v, layout, scale)
        return varlen.varlen_attention(q, k, v, layout, scale, by_documented_rules)

    assert_same(attend, alone(*tensors, scale), tensors, atol=1e-12, rtol=0)


def test_plain_sequences_are_not_copied():
    x = torch.randn(7, 2, 8)
    assert varlen.with_prompts(x, Layout([Segment(0, 3, [(3, 5)]), Segment(5, 7, [])], 7)) is x
    assert len(varlen.with_prompts(torch.randn(TOKENS, 2, 8), Layout(LAYOUT, TOKENS))) == TOKENS + 3 * 3 + 2 * 6


def stand_in(monkeypatch, way: str, tuples: bool = False):
    """The library's function, computed by what it documents from the arguments that it is given by name."""

    def flash(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        assert causal
        bounds = varlen.Bounds(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out = by_documented_rules(q, k, v, bounds, softmax_scale)
        return (out, None) if tuples else out

    def torchs(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert window_size == (-1, 0)
        assert enable_gqa == (q.shape[1] != k.shape[1])
        return by_documented_rules(q, k, v, varlen.Bounds(cu_seq_q, cu_seq_k, max_q, max_k), scale)

    if way == "torch_varlen":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torchs)
    else:
        module = ModuleType({"flash_attn_2": "flash_attn", "flash_attn_3": "flash_attn_interface"}[way])
        module.flash_attn_varlen_func = flash
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("tuples", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("way", ["flash_attn_2", "flash_attn_3", "torch_varlen"])
def test_kernels_are_called_as_they_document(way, kv_heads, tuples, monkeypatch):
    stand_in(monkeypatch, way, tuples)
    tensors, layout = qkv(kv_heads=kv_heads), Layout(LAYOUT, TOKENS)
    kernel = getattr(varlen, way)()
    attend = lambda q, k, v: varlen.varlen_attention(q, k, v, layout, 0.3, kernel)  # noqa: E731
    assert_same(attend, alone(*tensors, 0.3), tensors, atol=1e-12, rtol=0)


def test_torchs_kernel_is_there_and_is_called_by_names_that_it_has():
    tensors = [x.detach().to("meta", torch.bfloat16) for x in qkv()]
    out = varlen.varlen_attention(*tensors, Layout(LAYOUT, TOKENS), 0.3, varlen.torch_varlen())
    assert out.shape == tensors[0].shape


def test_a_model_on_a_gpu_attends_by_the_kernel_that_fits(monkeypatch):
    used = []

    def kernel(*arguments):
        used.append("kernel")
        return by_documented_rules(*arguments)

    monkeypatch.setattr(varlen, "kernel_for", lambda query, value: kernel)
    tensors, layout = qkv(), Layout(LAYOUT, TOKENS)
    monkeypatch.setattr("luffy.attention.on_cpu", lambda query: False)
    out = packed_attention(None, *tensors, None, scaling=0.3, layout=layout)[0]
    torch.testing.assert_close(out.transpose(1, 2), alone(*tensors, 0.3), atol=1e-12, rtol=0)
    assert used == ["kernel"]


def test_kernels_take_16_bits_and_one_head_size():
    def fits(dtype=torch.bfloat16, dim=64, value=None):
        query = torch.empty(1, 2, 3, dim, dtype=dtype)
        return varlen.fits(query, query if value is None else torch.empty(1, 2, 3, value, dtype=dtype))

    assert fits()
    assert fits(torch.float16, 256)
    assert not fits(torch.float32)
    assert not fits(dim=264)
    assert not fits(dim=60)
    assert not fits(dim=192, value=128)  # multi-head latent attention
    assert varlen.kernel_for(*qkv(torch.bfloat16)[::2]) is None  # no GPU


def test_the_kernel_is_one_that_the_gpu_can_run(monkeypatch):
    made = {way: object() for way in ("flash_attn_3", "flash_attn_2", "torch_varlen")}

    def missing():
        raise ImportError

    def best(capability: int, *installed: str):
        varlen.best.cache_clear()
        for way in made:
            monkeypatch.setattr(varlen, way, (lambda way=way: made[way]) if way in installed else missing)
        found = varlen.best(capability)
        return next((way for way, kernel in made.items() if kernel is found), None)

    try:
        assert best(9, *made) == "flash_attn_3"
        assert best(10, *made) == best(8, *made) == "flash_attn_2"
        assert best(9, "flash_attn_2", "torch_varlen") == "flash_attn_2"
        assert best(9, "torch_varlen") == "torch_varlen"
        assert best(9) is None
        assert best(7, *made) is None
    finally:
        varlen.best.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", ["flash_attn_3", "flash_attn_2", "torch_varlen", "flex"])
def test_on_a_gpu_every_kernel_gives_the_same(way):
    tensors, layout = qkv(torch.bfloat16, "cuda", dim=64), Layout(LAYOUT, TOKENS)
    want = alone(*tensors, None)
    if way == "flex":
        wide = [x.detach().float().requires_grad_() for x in tensors]
        out = packed_attention(None, *wide, None, layout=layout)[0].transpose(1, 2)
        torch.testing.assert_close(out, want.float(), atol=2e-2, rtol=0)
        return
    try:
        kernel = getattr(varlen, way)()
    except ImportError:
        pytest.skip(f"{way} is not installed")
    assert_same(
        lambda q, k, v: varlen.varlen_attention(q, k, v, layout, None, kernel), want, tensors, atol=2e-2, rtol=2e-2
    )
