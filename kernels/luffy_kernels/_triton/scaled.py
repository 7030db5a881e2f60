"""A saved gradient times what backward was given, rounded once: one pass over it.

On a device torch multiplies fp32 by a fp32 tensor into bfloat16 element by element, at a third of the memory's rate
(H200): 2.2 ms of the 46 that a policy loss of 8,192 tokens took.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def scaled_kernel(wide, factor, narrow, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    value = tl.load(wide + at, mask=live, other=0.0) * tl.load(factor)
    tl.store(narrow + at, value.to(narrow.dtype.element_ty), mask=live)


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor in this dtype, out of place. x: float32. factor: a number."""
    out = torch.empty_like(x, dtype=dtype)
    if not x.is_contiguous() or factor.dtype != torch.float32:
        return torch.mul(x, factor, out=out)
    if x.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device
            scaled_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, factor, out, x.numel(), BLOCK=BLOCK, num_warps=8)
    return out
