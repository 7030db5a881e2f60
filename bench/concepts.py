"""Figures of docs/concepts.md: what shaping does to a token, and which groups have a signal.

    python -m bench.concepts    writes docs/shaping.png and docs/groups.png

The curves of the first come from the operator that trains, not from the formula beside them.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from luffy_kernels import nll, power, shaped, token_loss
from luffy_kernels.token_losses import TokenLoss
from numpy.typing import NDArray

from bench.report import ROOT

SHAPING, GROUPS = ROOT / "docs" / "shaping.png", ROOT / "docs" / "groups.png"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#666666")  # told apart by the colour-blind too
GAMMAS = (0.1, 0.05, 0.3)
ROWS = 8
Curve = NDArray[np.float64]


def of_token(loss: TokenLoss, p: Curve) -> tuple[Curve, Curve]:
    """What a token of probability p with advantage 1 adds to the objective, and its gradient in log p."""
    logp = torch.from_numpy(np.log(p)).requires_grad_()
    loss_of = token_loss(logp, advantages=1.0, losses=loss).loss
    (gradient,) = torch.autograd.grad(loss_of.sum(), logp)
    return -loss_of.detach().numpy(), -gradient.numpy()


def with_signal(q: Curve, rows: int, traced: bool) -> Curve:
    """The share of groups whose rows do not all have one reward; q: how often a rollout is right. traced: one of the
    rows is a right trace."""
    return 1 - q ** (rows - 1) if traced else 1 - q**rows - (1 - q) ** rows


def draw_shaping() -> None:
    left, right = _axes()
    p = np.linspace(1e-4, 1, 400)
    small = np.geomspace(1e-4, 1, 400)
    losses = {f"p / (p + {gamma:g})": shaped(gamma) for gamma in GAMMAS} | {"p, not shaped": power(1.0, "prob")}
    for colour, style, (label, loss) in zip(COLOURS, ("-", "--", ":", "-."), losses.items(), strict=False):
        left.plot(p, of_token(loss, p)[0], style, color=colour, label=label)
        right.plot(small, of_token(loss, small)[1], style, color=colour, label=label)
    right.plot(small, of_token(nll(), small)[1], color=COLOURS[-1], lw=1, label="log p, as in SFT")
    left.set(title="what a trace's token adds", xlabel="p, the policy's probability of the token", ylim=(0, 1))
    right.set(title="its gradient in log p", xlabel="p, logarithmic", xscale="log", ylim=(0, 1.05))
    _write(left.figure, SHAPING, (left, right))


def draw_groups() -> None:
    left, right = _axes()
    for axis, q in ((left, np.linspace(0, 1, 400)), (right, np.geomspace(1e-4, 1, 400))):
        axis.plot(q, with_signal(q, ROWS, False), "--", color=COLOURS[1], label=f"{ROWS} rollouts")
        axis.plot(q, with_signal(q, ROWS, True), color=COLOURS[0], label=f"{ROWS - 1} rollouts, a right trace")
        axis.set(xlabel="q, how often a rollout is right", ylim=(0, 1.03))
    left.set(title="share of groups with advantages")
    right.set(title="the same, for hard problems", xscale="log", xlim=(1e-4, 1))
    _write(left.figure, GROUPS, (left,))


def _axes() -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")[1]


def _write(figure: Any, path: Any, legends: tuple[Any, ...]) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in legends:
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m bench.concepts", description=__doc__.split("\n\n")[0]).parse_args(argv)
    draw_shaping()
    draw_groups()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
