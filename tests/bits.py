"""What "the same bits" can mean where kernels are interpreted."""

from functools import cache

import numpy as np
import torch


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """To the bit, on a GPU and wherever the interpreter's products are summed in one order. On processors where they
    are not, which is asked and not assumed, to some units in the last place of the largest."""
    if torch.cuda.is_available() or numpy_sums_in_one_order():
        assert torch.equal(got, want)
    else:
        last_place = torch.finfo(want.dtype).eps * want.float().abs().max().item()
        torch.testing.assert_close(got, want, atol=8 * last_place, rtol=0)


@cache
def numpy_sums_in_one_order() -> bool:
    """Whether numpy's product of a row has the same bits wherever the row is in its matrix, and however the other
    matrix lies in memory: a tile's product under the interpreter is numpy's. BLAS may sum a matrix's edge rows in
    another order, and may have another kernel for a transposed operand, which is what a tile read by descriptor is."""
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16):
        row, other = rng.standard_normal((1, 64)).astype(dtype), rng.standard_normal((64, 64)).astype(dtype)
        for height in (16, 32, 64):
            placed = [np.roll(np.pad(row, ((0, height - 1), (0, 0))), at, 0) for at in range(height)]
            for lies in (other, np.ascontiguousarray(other.T).T):
                products = [np.matmul(tile, lies)[at] for at, tile in enumerate(placed)]
                if any(not np.array_equal(np.matmul(placed[0], other)[0], product) for product in products):
                    return False
    return True
