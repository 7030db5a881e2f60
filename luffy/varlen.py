"""Packed attention on a GPU by a kernel for sequences of different lengths: flash-attn's where installed, else torch's.

Such a kernel takes the tokens of all sequences one after the other, with where each begins, of queries and of keys, and
aligns its causal mask with the last query and the last key. That is what a packed group asks for: a row's queries are
its own tokens, its keys the prompt's and then its own. So queries stay as they lie, and of keys and values the
prompt's are copied once for each row. `tests/test_attention.py` compares the pieces with single sequences on a CPU and,
where there is a GPU, the kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from luffy.attention import Layout

HEAD_DIM = 256
"""The widest head that these kernels take."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where each sequence begins and the last one ends, [S + 1] int32 of queries and of keys, and the longest."""

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int

    @classmethod
    def of(cls, layout: "Layout", device: torch.device) -> "Bounds":
        queries, keys = [], []
        for segment in layout.segments:
            first, *rows = segment.spans
            queries += [first, *rows]
            keys += [first, *(first + row for row in rows)]

        def begins(lengths: list[int]) -> Tensor:
            return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

        return cls(begins(queries), begins(keys), max(queries), max(keys))


Kernel = Callable[[Tensor, Tensor, Tensor, Bounds, float | None], Tensor]
"""(queries [T, Hq, D], keys [T', Hkv, D], values, bounds, scale) -> [T, Hq, D], causal as described above."""


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: "Layout", scale: float | None, kernel: Kernel
) -> Tensor:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, Hq, T, D] by one call of `kernel`."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = kernel(q, with_prompts(k, layout), with_prompts(v, layout), layout.bounds(q.device), scale)
    return out.transpose(0, 1)[None]


def with_prompts(x: Tensor, layout: "Layout") -> Tensor:
    """[T, H, D] -> [T', H, D]: before each row that shares a prompt a copy of that prompt."""
    if all(segment.is_plain for segment in layout.segments):
        return x
    pieces = iter(x.split([span for segment in layout.segments for span in segment.spans]))
    laid = []
    for segment in layout.segments:
        prompt, *rows = (next(pieces) for _ in segment.spans)
        laid += [prompt, *(piece for row in rows for piece in (prompt, row))]
    return torch.cat(laid)


def kernel_for(query: Tensor, value: Tensor) -> Kernel | None:
    """The kernel for tensors like these on their device; None where there is none."""
    if query.device.type != "cuda" or not fits(query, value):
        return None
    return best(torch.cuda.get_device_capability(query.device)[0])


def fits(query: Tensor, value: Tensor) -> bool:
    """Whether these kernels take such tensors: 16 bits, one head size for all, a multiple of 8 up to 256."""
    size = query.shape[-1]
    return query.dtype in (torch.bfloat16, torch.float16) and value.shape[-1] == size <= HEAD_DIM and size % 8 == 0


@cache
def best(capability: int) -> Kernel | None:
    """The fastest kernel that is installed and made for GPUs of this major compute capability."""
    if capability < 8:
        return None
    for find in (*([flash_attn_3] if capability == 9 else []), flash_attn_2, torch_varlen):
        try:
            return find()
        except ImportError:  # a build for another torch or CUDA says so in this way too
            continue
    return None


def flash_attn_3() -> Kernel:
    """
    Raises:
        ImportError: it is not installed.
    """
    from flash_attn_interface import flash_attn_varlen_func

    return _flash_attn(flash_attn_varlen_func)


def flash_attn_2() -> Kernel:
    """
    Raises:
        ImportError: it is not installed.
    """
    from flash_attn import flash_attn_varlen_func

    return _flash_attn(flash_attn_varlen_func)


def _flash_attn(flash_attn_varlen_func: Callable[..., Any]) -> Kernel:
    def call(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, scale: float | None) -> Tensor:
        out = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=bounds.queries,
            cu_seqlens_k=bounds.keys,
            max_seqlen_q=bounds.longest_queries,
            max_seqlen_k=bounds.longest_keys,
            softmax_scale=scale,
            causal=True,
        )
        return out[0] if isinstance(out, tuple) else out  # early releases of 3 add the log-sum-exp

    return call


def torch_varlen() -> Kernel:
    """torch's own flash attention.

    Raises:
        ImportError: this torch has none.
    """
    from torch.nn.attention.varlen import varlen_attn

    asks = "enable_gqa" in signature(varlen_attn).parameters  # from torch 2.12 on; before, heads may be grouped unasked

    def call(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, scale: float | None) -> Tensor:
        grouped: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if asks else {}
        out: Any = varlen_attn(
            q,
            k,
            v,
            bounds.queries,
            bounds.keys,
            bounds.longest_queries,
            bounds.longest_keys,
            scale=scale,
            window_size=(-1, 0),
            **grouped,
        )
        return out

    return call
