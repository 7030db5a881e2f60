"""How much arithmetic an update is, and how much of a machine's it uses. docs/planning.md explains the formulas.

    T tokens of a packed batch   P attended pairs (query, key) of one head   N targets, tokens that the head sees
    B parameters of the blocks' products   H, V head   L blocks   A = heads x head_dim

    body     2 B T + 4 L A P      forward: a product is 2 FLOP per weight and token; scores and values 2 A each a pair
    head     2 H V N              forward
    update   3 (body + head)      backward is twice forward; `linear_policy_loss` has the head's three products
    frozen   4 B T + 12 L A P + 2 head      under LoRA: weights have no gradient, and adapters are left out

Norms, rotations, activations and softmax are left out, a recomputed forward pass too: what is counted is the work that
the model asks for, so time lost to recomputation shows as a lower MFU (model FLOP utilisation, arXiv 2204.02311).
Imports no torch.
"""

from luffy.shapes import Shape, shape_of

__all__ = ["Shape", "attended_pairs", "attention_weight", "forward_flops", "head_flops", "mfu", "shape_of"]
__all__ += ["step_flops", "update_flops"]


def attended_pairs(prompt: int, rows: list[int]) -> int:
    """Pairs (query, key) of a packed segment, for one head of one block: `prompt` tokens once, then rows of so many
    tokens, each attending to the prompt and to itself, causally. One sequence is `attended_pairs(tokens, [])`."""
    return prompt * (prompt + 1) // 2 + sum(row * prompt + row * (row + 1) // 2 for row in rows)


def forward_flops(shape: Shape, tokens: int, pairs: int) -> int:
    """FLOP of the body's forward pass over `tokens` packed tokens with `pairs` attended pairs."""
    return shape.layers * (2 * shape.block_matrices * tokens + 4 * shape.attention * pairs)


def head_flops(shape: Shape, targets: int) -> int:
    """FLOP of the head's product for `targets` tokens, forward alone."""
    return 2 * shape.head * targets


def update_flops(shape: Shape, tokens: int, pairs: int, targets: int, frozen: bool = False) -> int:
    """FLOP of forward and backward: three times forward, of body and head; less the gradients of weights that are
    frozen. Targets whose advantage is 0 count as all others, though the head spares two thirds of theirs."""
    forward, head = forward_flops(shape, tokens, pairs), head_flops(shape, targets)
    return 3 * (forward + head) - (forward_flops(shape, tokens, 0) + head if frozen else 0)


def step_flops(shape: Shape, tokens: int, pairs: int, targets: int, first_pass: bool, frozen: bool = False) -> int:
    """FLOP of a step's updates. first_pass: the log-probs of all targets come first, as several updates need them, or a
    correction (`luffy.correction`)."""
    first = forward_flops(shape, tokens, pairs) + head_flops(shape, targets) if first_pass else 0
    return first + update_flops(shape, tokens, pairs, targets, frozen)


def mfu(flops: float, seconds: float, peak: float, devices: int = 1) -> float:
    """Fraction of the machine's arithmetic: flops / (seconds x devices x peak), `peak` in FLOP/s of one device.

    Raises:
        ValueError: seconds, peak or devices are not positive.
    """
    if not (seconds > 0 and peak > 0 and devices > 0):
        raise ValueError(f"mfu: seconds, peak and devices must be positive, got {seconds}, {peak}, {devices}")
    return flops / (seconds * devices * peak)


def attention_weight(shape: Shape) -> float:
    """Cost of one attended pair in units of all other work on a token of the body: 4 L A / (2 L B_block).

    A sequence of n tokens costs n + attention_weight x n (n + 1) / 2 such units: what packing balances.
    """
    return 4 * shape.attention / (2 * shape.block_matrices)
