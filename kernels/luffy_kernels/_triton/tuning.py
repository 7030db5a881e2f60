"""Which block sizes a kernel runs with: a plain table by (kernel, architecture, bucket), no autotuning at import.

Rows were chosen so that the compiled kernels spill next to nothing and fit shared memory on their architecture
(`bench.aot` checks every row). Those of sm_90 and 16 bits were timed on an H200, the others on nothing yet.
LUFFY_KERNELS_TUNE=1 times the candidates on the device at hand when a row is first asked for, uses the best in this
process and prints it for this table (`search`).

A bucket says what the model and its dtype are, never how many rows a call has: a row's bits are the same in any batch.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl

Config = dict[str, Any]
Key = tuple[str, str, str]

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")


GROUP = 16
MERGE_BLOCK = 128
"""Rows of a program of `merge_kernel`. One size for any number of rows: lanes do not mix, so it changes no bits, and it
spares a compilation per size."""


def tile(
    m: int, n: int, k: int, warps: int, stages: int, split: int | None = None, group: int = GROUP, tma: bool = False
) -> Config:
    """split: tiles of the vocabulary that one program reduces. group: row tiles that are in flight together, for the
    second-level cache. tma: operands are fetched by descriptors (`logprobs.Operands`)."""
    config = {"GROUP": group, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
    config["TMA"] = tma
    return config if split is None else {"SPLIT": split, **config}


def row(block: int, warps: int) -> Config:
    return {"BLOCK": block, "num_warps": warps}


# "" is the bucket of what has no row of its own; 16 and 32 are the bits of an operand. fp32 products are IEEE ones.
TABLE: dict[Key, Config] = {
    ("rows", "interpreter", ""): row(128, 4),
    ("rows", "sm_80", ""): row(4096, 8),
    ("rows", "sm_86", ""): row(4096, 8),
    ("rows", "sm_89", ""): row(4096, 8),
    ("rows", "sm_90", ""): row(4096, 8),
    ("rows", "sm_100", ""): row(4096, 8),
    ("rows", "sm_120", ""): row(2048, 8),
    ("rows", "gfx942", ""): row(4096, 8),
    ("rows", "gfx950", ""): row(4096, 8),
    ("logprobs", "interpreter", ""): tile(16, 64, 32, 4, 2, split=4),
    ("logprobs", "sm_80", "16"): tile(128, 128, 64, 8, 3, split=16),
    ("logprobs", "sm_86", "16"): tile(128, 128, 64, 8, 3, split=16),
    ("logprobs", "sm_89", "16"): tile(128, 128, 64, 8, 3, split=16),
    ("logprobs", "sm_90", "16"): tile(128, 256, 64, 8, 3, split=16, tma=True),
    ("logprobs", "sm_100", "16"): tile(128, 256, 64, 8, 4, split=16),
    ("logprobs", "sm_120", "16"): tile(128, 128, 64, 8, 3, split=16),
    ("logprobs", "gfx942", "16"): tile(128, 128, 64, 8, 2, split=16),
    ("logprobs", "gfx950", "16"): tile(128, 128, 64, 8, 2, split=16),
    ("logprobs", "sm_80", "32"): tile(64, 128, 16, 8, 2, split=16),
    ("logprobs", "sm_86", "32"): tile(64, 128, 16, 8, 2, split=16),
    ("logprobs", "sm_89", "32"): tile(64, 128, 16, 8, 2, split=16),
    ("logprobs", "sm_90", "32"): tile(64, 128, 16, 8, 2, split=16),
    ("logprobs", "sm_100", "32"): tile(64, 128, 16, 8, 2, split=16),
    ("logprobs", "sm_120", "32"): tile(64, 128, 16, 8, 2, split=16),
    ("logprobs", "gfx942", "32"): tile(64, 64, 32, 4, 2, split=16),
    ("logprobs", "gfx950", "32"): tile(64, 64, 32, 4, 2, split=16),
    ("logprobs_backward", "interpreter", ""): tile(16, 64, 32, 4, 2),
    ("logprobs_backward", "sm_80", "16"): tile(256, 128, 64, 8, 3),
    ("logprobs_backward", "sm_86", "16"): tile(128, 128, 64, 8, 3),
    ("logprobs_backward", "sm_89", "16"): tile(128, 128, 64, 8, 3),
    ("logprobs_backward", "sm_90", "16"): tile(128, 256, 64, 8, 3, tma=True),
    ("logprobs_backward", "sm_100", "16"): tile(128, 256, 64, 8, 4),
    ("logprobs_backward", "sm_120", "16"): tile(128, 128, 64, 8, 3),
    ("logprobs_backward", "gfx942", "16"): tile(256, 128, 32, 8, 2),
    ("logprobs_backward", "gfx950", "16"): tile(256, 128, 64, 8, 2),
    ("logprobs_backward", "sm_80", "32"): tile(64, 128, 16, 8, 2),
    ("logprobs_backward", "sm_86", "32"): tile(64, 128, 16, 8, 2),
    ("logprobs_backward", "sm_89", "32"): tile(64, 128, 16, 8, 2),
    ("logprobs_backward", "sm_90", "32"): tile(64, 128, 16, 8, 2),
    ("logprobs_backward", "sm_100", "32"): tile(64, 128, 16, 8, 2),
    ("logprobs_backward", "sm_120", "32"): tile(64, 128, 16, 8, 2),
    ("logprobs_backward", "gfx942", "32"): tile(64, 64, 32, 4, 2),
    ("logprobs_backward", "gfx950", "32"): tile(64, 64, 32, 4, 2),
}


def arch(device: torch.device) -> str:
    """The architecture of the table whose code this device runs best: its own, or the nearest of its family."""
    if device.type == "cpu" or os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    if torch.version.hip:
        return amd_arch(torch.cuda.get_device_properties(device).gcnArchName)
    return nvidia_arch(*torch.cuda.get_device_capability(device))


def amd_arch(name: str) -> str:
    """From gcnArchName, which may carry features behind a colon. gfx942 has the least shared memory."""
    return "gfx950" if name.startswith("gfx95") else "gfx942"


def nvidia_arch(major: int, minor: int) -> str:
    """The newest not newer than the device; for one older than all, and for small relatives of sm_80, sm_86."""
    known = {name: int(name[3:]) for name in ARCHITECTURES if name.startswith("sm_")}
    fitting = [name for name, version in known.items() if version <= 10 * major + minor]
    return max(fitting, key=known.__getitem__, default="sm_86")


def lookup(kernel: str, architecture: str, *buckets: str) -> Config:
    """The row of the first of these buckets that has one, ending with the kernel's own on this architecture."""
    for bucket in (*buckets, ""):
        if (config := TABLE.get((kernel, architecture, bucket))) is not None:
            return dict(config)
    raise KeyError(f"no row for {kernel} on {architecture} in {buckets}")


def row_buckets(padded: int) -> tuple[str, ...]:
    return (f"V{triton.next_power_of_2(padded)}",)


def tile_buckets(operand: torch.dtype, width: int) -> tuple[str, ...]:
    bits = str(8 * operand.itemsize)
    return f"{bits} H{triton.next_power_of_2(width)}", bits


def row_config(kernel: str, device: torch.device, padded: int) -> Config:
    architecture, buckets = arch(device), row_buckets(padded)
    if searching(kernel, architecture, buckets[0]):
        from . import search  # late: it imports this

        search.row(kernel, device, padded)
    config = lookup(kernel, architecture, *buckets)
    config["BLOCK"] = min(config["BLOCK"], triton.next_power_of_2(padded))
    return config


def tile_config(kernel: str, device: torch.device, operand: torch.dtype, width: int) -> Config:
    architecture, buckets = arch(device), tile_buckets(operand, width)
    if searching(kernel, architecture, buckets[0]):
        from . import search

        search.tile(kernel, device, operand, width)
    return lookup(kernel, architecture, *buckets)


def searching(kernel: str, architecture: str, bucket: str) -> bool:
    """Whether to time candidates now: asked for, on a device, and the bucket has no row of its own yet."""
    asked = os.environ.get("LUFFY_KERNELS_TUNE") == "1"
    return asked and architecture != "interpreter" and (kernel, architecture, bucket) not in TABLE


def dot_dtype(operand: torch.dtype) -> tl.dtype:
    """What tl.dot multiplies; the interpreter would multiply the raw bits of bfloat16."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[operand]
