"""What "the same bits" can mean where kernels are interpreted."""

from functools import cache

import numpy as np
import torch


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """To the bit, on a GPU and wherever the interpreter's products are those of a row alone. On processors where they
    are not, which is asked and not assumed, to 1e-6."""
    if torch.cuda.is_available() or numpy_rows_stand_alone():
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@cache
def numpy_rows_stand_alone() -> bool:
    """Whether numpy's product of a row has the same bits wherever the row is in its matrix: a tile's product under the
    interpreter is numpy's, and BLAS may sum a matrix's edge rows in another order."""
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16):
        row, other = rng.standard_normal((1, 64)).astype(dtype), rng.standard_normal((64, 64)).astype(dtype)
        for height in (16, 32, 64):
            products = [
                np.matmul(np.roll(np.pad(row, ((0, height - 1), (0, 0))), at, 0), other)[at] for at in range(height)
            ]
            if any(not np.array_equal(products[0], product) for product in products):
                return False
    return True
