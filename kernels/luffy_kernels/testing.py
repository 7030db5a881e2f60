"""The accuracy assertion that tests and benchmarks share."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_good_as(ours: Tensor, baseline: Tensor, truth: Tensor, *, atol: float, name: str = "result") -> None:
    """Asserts |ours - truth| <= |baseline - truth| + atol, element by element.

    Args:
        ours: [...], the result under test. baseline: likewise, the plain computation in the same low precision. truth:
            likewise, float64.
        atol: allowance, in the result's own units. A NaN of ours where truth has none always fails.

    Raises:
        AssertionError: an element of ours is further off than that. ValueError: shapes that differ.
    """
    if not ours.shape == baseline.shape == truth.shape:
        raise ValueError(f"assert_as_good_as: shapes must agree, got {ours.shape}, {baseline.shape}, {truth.shape}")
    exact = truth.detach().double()
    error, allowed = (ours.detach().double() - exact).abs(), (baseline.detach().double() - exact).abs() + atol
    excess = torch.where(error.isnan(), torch.inf, error - allowed)
    if excess.numel() == 0 or float(excess.max()) <= 0:
        return
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    raise AssertionError(
        f"{name}: {int((excess > 0).sum())} of {excess.numel()} elements are worse than the baseline, first {worst}: "
        f"ours {float(ours[worst]):.9g}, baseline {float(baseline[worst]):.9g}, truth {float(exact[worst]):.9g} "
        f"(error {float(error[worst]):.3g}, allowed {float(allowed[worst]):.3g})"
    )
