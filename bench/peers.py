"""Algorithms of the LM-head losses as data for `bench.roofline`: what each one multiplies, passes over and keeps.

N tokens, H hidden, V vocabulary. A tile is a block of the [N, V] logits: rows are tokens, columns the vocabulary. Bytes
are counted per logit (passes), per element of dW or dX and tile (additions), or per element once (`finish`).

Nothing was run for this. The counts come from reading the projects' sources of mid-2026 (linkedin/Liger-Kernel,
verl-project/verl, huggingface/trl, unslothai/unsloth-zoo, NVIDIA-NeMo/RL, PrimeIntellect-ai/prime-rl,
fla-org/flash-linear-attention, pytorch/pytorch), and for the CuTe kernels, Dao-AILab/quack and apple/ml-cross-entropy
from descriptions of them. Projects change: correct a row here. What an H200 takes is in
bench/results/gpu_check-NVIDIA-H200.json: ours, plain torch, TRL and Liger's GRPO up to 1.5 times as much as computed,
cut-cross-entropy and verl more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

MODES = {
    "logp": "log-probs, forward without gradients",
    "logp_entropy": "log-probs and entropy, forward and backward",
    "ce": "scalar cross-entropy, forward and backward",
    "policy": "scalar policy loss (GRPO-like, no entropy term), forward and backward",
}
LOGP, ENTROPY, CE, POLICY = MODES
# An eager fp32 operation over a tile, bytes per element. A row of logits outgrows the caches: every sweep is traffic.
REDUCE, UNARY, BINARY, FILL = 4, 8, 12, 4
SOFTMAX = 16  # torch's softmax and log-softmax, and their backward: three reads and a write
LOGSUMEXP = REDUCE + 2 * UNARY + REDUCE  # max, subtract, exp, sum
UPCAST = DOWNCAST = 6  # between 16 and 32 bits
NARROW = 4  # an operation of 16-bit values, read and written
PARTIALS = 24  # statistics of a row and vocabulary split, three fp32 numbers, written and read once
GIB = 1 << 30


class Work(NamedTuple):
    """One call. `active`: the share of rows with a gradient. The others are ignored targets in `ce`, and else valid
    tokens whose coefficient is zero (advantage 0, clipped)."""

    hidden: int
    vocabulary: int
    tokens: int
    mode: str
    frozen: bool = False
    active: float = 1.0


class Add(NamedTuple):
    """Bytes per element that a GEMM's result costs: in the GEMM's own kernel, and in passes after it."""

    gemm: float
    after: float = 0


WRITTEN, IN_BF16, IN_FP32 = Add(2), Add(4), Add(8)  # stored; read, added to and stored by the GEMM itself (beta = 1)
ADDED_BF16 = Add(2, 2 + NARROW)  # stored, then added to the sum by another kernel


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One implementation in some modes. Its forward sweep makes logits, its backward sweep dX and dW, tile by tile."""

    impl: str
    modes: tuple[str, ...]
    rows: Callable[[Work], int] = lambda w: w.tokens  # of a tile
    columns: Callable[[Work], int] = lambda w: w.vocabulary
    logits: float = 2  # the forward GEMM stores; 0: its epilogue reduces them, in one launch for all tiles
    forward: float = 0  # passes after it
    recompute: float | None = None  # what a second logits GEMM stores in the backward sweep; None: there is none
    backward: float = 0  # passes before dX and dW
    dz: float = 2  # the gradient of a logit as a GEMM reads it, where that has no fp32 operands
    fp32: str = ""  # GEMMs with fp32 operands, of dX and dW
    dx: Add = WRITTEN
    dw: Add = WRITTEN
    finish: tuple[float, float] = (0, 0)  # zeroing, scaling and casting dW, dX
    skips: str = ""  # dw: the GEMM of a frozen head; ignored: their rows; zero: backward of rows without a coefficient
    held: float = 0  # bytes per logit of a tile that live at once without gradients
    # Bytes at the peak beside the operands and the gradients in their dtype, of tile, V H (0 without dW) and N H.
    extra: Callable[[float, float, float], float] = lambda tile, vh, nh: 2 * tile
    gpus: tuple[str, ...] = ("H100", "H200", "B200", "MI300X")
    lacks: str = ""  # what of mode logp_entropy it does not compute


def square(work: Work) -> int:
    """Rows of a tile as large as hidden, to the next power of two: Liger's and PyTorch's choice."""
    return 1 << (-(-work.tokens // -(-work.vocabulary // work.hidden)) - 1).bit_length()


ALL_MODES = tuple(MODES)
NAIVE = Algorithm(
    impl="naive",  # F.linear, float(), log_softmax, gather
    modes=(LOGP, CE, POLICY),
    forward=UPCAST + SOFTMAX,
    backward=FILL + SOFTMAX + DOWNCAST,
    skips="dw",
    held=2 + 4 + 4,
    extra=lambda tile, vh, nh: (2 + 3 * 4) * tile,
)
LIGER_FLCE = Algorithm(
    impl="liger_flce",  # Triton; dW by addmm in place. Versions that widen and add a product move 16 bytes, not 4
    modes=(CE,),
    rows=square,
    forward=2,
    backward=NARROW,
    dw=IN_BF16,
    finish=(2, 2),
    skips="dw",
    held=2,
)
VERL_TORCH = Algorithm(
    impl="verl_torch",  # FusedLinearForPPO; its forward always computes the entropy
    modes=(LOGP, CE, POLICY),
    rows=lambda w: 512,
    forward=NARROW + UPCAST + 2 * SOFTMAX + LOGSUMEXP + BINARY + REDUCE,
    recompute=2,
    backward=NARROW + UPCAST + SOFTMAX + FILL + BINARY + 2 * UNARY + DOWNCAST + NARROW,
    dx=ADDED_BF16,
    dw=ADDED_BF16,
    finish=(2, 2),
    held=2 + 4 * 4,
    extra=lambda tile, vh, nh: (2 + 6 * 4) * tile + 2 * vh,
)
TORCH_LCE = Algorithm(
    impl="torch_lce",  # F.linear_cross_entropy with LinearCrossEntropyOptions(): "compact", "aspect_ratio:2"
    modes=(CE,),
    rows=lambda w: max(1, square(w) // 2),
    logits=4,
    forward=2 * REDUCE + 2 * UNARY,
    backward=UNARY + DOWNCAST,
    dw=IN_BF16,
    finish=(2 + NARROW, 2 + NARROW),
    skips="dw",
    held=4,
    extra=lambda tile, vh, nh: 6 * tile,
)
ALGORITHMS = (
    Algorithm(
        impl="ours",  # linear_policy_loss, linear_cross_entropy: fp32 logits, dz written over them
        modes=(CE, POLICY),
        rows=lambda w: max(1, GIB // (4 * w.vocabulary)),
        logits=4,
        forward=REDUCE,
        backward=4 + 2,
        dx=Add(2, 2 * NARROW),  # gather hidden, scatter dX
        dw=IN_FP32,
        finish=(DOWNCAST - FILL, 2 + NARROW),  # scaled and cast in one pass; the first chunk writes dW, adds nothing
        skips="dw ignored zero",
        extra=lambda tile, vh, nh: 4 * tile + 4 * vh,
    ),
    Algorithm(
        impl="ours",  # linear_logprobs: statistics in the epilogue; backward over vocabulary slices
        modes=(LOGP, ENTROPY),
        columns=lambda w: max(1, int(GIB / (2 * w.tokens * w.active))),
        logits=0,
        forward=PARTIALS / 2048,
        recompute=2,
        dx=IN_FP32,
        finish=(0, FILL + DOWNCAST),
        skips="dw ignored zero",
        held=PARTIALS / 2 / 2048,
        extra=lambda tile, vh, nh: 2 * tile + 4 * nh,
    ),
    NAIVE,
    replace(
        NAIVE,  # exp, times log-probs, summed; both products' gradients and two sums of gradients
        modes=(ENTROPY,),
        forward=NAIVE.forward + UNARY + BINARY + REDUCE,
        backward=NAIVE.backward + 2 * UNARY + BINARY + 2 * BINARY,
        extra=lambda tile, vh, nh: (2 + 5 * 4) * tile,
    ),
    Algorithm(
        impl="liger_grpo",  # LigerFusedLinearGRPOLoss on sequences of 2,048 tokens, one [V, H] fp32 sum per sequence
        modes=(POLICY,),
        rows=lambda w: 2048,
        columns=lambda w: 4096,
        forward=UPCAST + 3 * UNARY + 2 * REDUCE,
        recompute=2,
        backward=UPCAST + 5 * UNARY,
        fp32="dx dw",
        dx=Add(4, BINARY + UPCAST),
        dw=Add(4, UPCAST + FILL + BINARY + DOWNCAST + 6),  # widen W; zero, add, narrow; add to the total
        finish=(2, FILL + DOWNCAST),
        extra=lambda tile, vh, nh: 16 * tile + 6 * vh + 4 * nh,
    ),
    LIGER_FLCE,
    replace(LIGER_FLCE, modes=(LOGP, POLICY), recompute=2, backward=2 + 2 * NARROW),  # reduction="none"
    Algorithm(
        impl="liger_flce_cute",
        modes=(CE,),
        rows=lambda w: 4096,
        backward=NARROW,
        dw=IN_BF16,
        skips="dw",
        gpus=("H100", "H200", "B200"),
    ),
    Algorithm(
        impl="liger_flsce",  # CuTe, (nll, entropy); backward in waves of rows
        modes=ALL_MODES,
        rows=lambda w: 1024,
        logits=0,
        forward=PARTIALS / 1024,
        recompute=2,
        dw=IN_BF16,
        held=PARTIALS / 2 / 1024,
        gpus=("H100", "H200"),
    ),
    Algorithm(
        impl="cce",  # the exact preset: no block is filtered. Sums under locks are taken to stay in the caches
        modes=ALL_MODES,
        logits=0,
        recompute=0,
        dz=0,
        skips="dw ignored",
        extra=lambda tile, vh, nh: 0,
        gpus=("H100", "H200", "B200"),
        lacks="no entropy",
    ),
    Algorithm(
        impl="verl_triton",
        modes=ALL_MODES,
        columns=lambda w: 9504,
        logits=0,
        forward=PARTIALS / 1024,
        recompute=2,
        dx=ADDED_BF16,
        held=PARTIALS / 2 / 1024,
        gpus=("H100", "H200", "B200"),
    ),
    VERL_TORCH,
    replace(
        VERL_TORCH,
        modes=(ENTROPY,),
        backward=VERL_TORCH.backward + SOFTMAX + LOGSUMEXP + REDUCE + 2 * UNARY + 3 * BINARY,
    ),
    Algorithm(
        impl="quack",  # exp of the logits stored once, rescaled while dX and dW read them
        modes=(CE,),
        rows=lambda w: 4096,
        dw=IN_FP32,
        finish=(DOWNCAST, 0),
        skips="dw",
        extra=lambda tile, vh, nh: 2 * tile + 4 * vh,
        gpus=("H100", "H200", "B200"),
    ),
    Algorithm(
        impl="trl_logp",  # ChunkedLogProbFunction of TRL 1.16: tiles of both, folded and turned into dz by its kernels
        modes=ALL_MODES,
        rows=lambda w: 4096,
        columns=lambda w: 8192,
        forward=2,
        recompute=2,
        backward=NARROW,
        dx=IN_FP32,
        dw=IN_FP32,
        finish=(FILL + DOWNCAST, FILL + DOWNCAST),
        skips="ignored",
        held=2,
        extra=lambda tile, vh, nh: 2 * tile + 4 * vh + 4 * nh,
    ),
    Algorithm(
        impl="trl_chunked_nll",  # checkpointed chunks under bf16 autocast, with entropy and accuracy for the log
        modes=(CE,),
        rows=lambda w: 256,
        forward=UPCAST + SOFTMAX + UNARY + BINARY + 2 * REDUCE,
        recompute=2,
        backward=UPCAST + SOFTMAX + UNARY + BINARY + 2 * REDUCE + FILL + SOFTMAX + DOWNCAST,
        dw=ADDED_BF16,
        skips="dw ignored",
        extra=lambda tile, vh, nh: 14 * tile + 2 * vh,
    ),
    Algorithm(
        impl="unsloth",  # chunked log-softmax, compiled, recomputed; the offload of hidden to the host is not counted
        modes=ALL_MODES,
        rows=lambda w: -(-w.tokens // 4),
        forward=2 + 2,
        recompute=2,
        backward=2 + 2 + NARROW,
        dw=ADDED_BF16,
        skips="dw",
        held=2 + 4,
        extra=lambda tile, vh, nh: (2 + 4) * tile + 2 * vh,
        lacks="no entropy",
    ),
    Algorithm(
        impl="nemo_rl",  # ChunkedDistributedHiddenStatesToLogprobs, one rank; the one-hot is int64
        modes=ALL_MODES,
        rows=lambda w: 256,
        forward=UPCAST + 4 * UNARY + 2 * REDUCE,
        recompute=2,
        backward=UPCAST + 4 * UNARY + 2 * REDUCE + UNARY + 8 + 16 + 12 + BINARY + UNARY,
        fp32="dx dw",
        dx=Add(4, UPCAST),
        dw=Add(4, UPCAST + UNARY + 8),  # widen W; transpose; add
        finish=(2, DOWNCAST),
        held=2 + 4 + 4,
        extra=lambda tile, vh, nh: (2 + 4 + 8 + 8) * tile + 8 * vh + 4 * nh,
        lacks="no entropy",
    ),
    Algorithm(
        impl="prime_rl",  # FusedOutputLinear
        modes=ALL_MODES,
        rows=lambda w: 8192,
        columns=lambda w: 8192,
        forward=UPCAST + 3 * UNARY + BINARY + 3 * REDUCE,
        recompute=2,
        backward=UPCAST + 5 * UNARY + 2 * DOWNCAST,
        dx=ADDED_BF16,
        dw=ADDED_BF16,
        finish=(2, 2),
        skips="dw ignored",
        held=2 + 3 * 4,
        extra=lambda tile, vh, nh: (2 + 3 * 4) * tile,
        lacks="no entropy grad",
    ),
    TORCH_LCE,
    replace(  # reduction="none"
        TORCH_LCE, modes=(LOGP, POLICY), recompute=4, backward=TORCH_LCE.forward + TORCH_LCE.backward, finish=(2, 2)
    ),
    Algorithm(
        impl="fla",  # FusedLinearCrossEntropyLoss
        modes=(CE,),
        rows=lambda w: 1 << (-(-w.tokens // min(8, -(-w.vocabulary // w.hidden))) - 1).bit_length(),
        forward=2,
        backward=NARROW + UPCAST,
        fp32="dw",
        dx=Add(2, 2 * NARROW),
        dw=IN_FP32,
        finish=(FILL + DOWNCAST, 2),
        extra=lambda tile, vh, nh: (2 + 4) * tile + 4 * vh,
    ),
)


def find(impl: str, mode: str) -> Algorithm | None:
    return next((a for a in ALGORITHMS if a.impl == impl and mode in a.modes), None)
