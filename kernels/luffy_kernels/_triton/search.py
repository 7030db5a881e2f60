"""LUFFY_KERNELS_TUNE=1: times candidates on the device at hand and prints the best as a row of `tuning.TABLE`.

Runs the first time that a (kernel, architecture, bucket) is asked for, on synthetic buffers of a typical size whose
number of rows is fixed: what is chosen depends on the bucket alone, as every row of the table must.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
from torch import Tensor

from . import tuning

ROWS = {"rows": 1024, "logprobs": 4096, "logprobs_backward": 4096}
VOCABULARY = 32768
Launch = Callable[[], object]
Timer = Callable[[Launch], float]

BLOCKS = ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16))
TILES = {
    ("sm", 16): (
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
        (256, 128, 64, 8, 3),
        (256, 128, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 4, 3),
        (128, 128, 32, 8, 4),
        (64, 256, 32, 8, 4),
        (64, 128, 64, 4, 3),
    ),
    ("gfx", 16): (
        (256, 128, 32, 8, 2),
        (256, 128, 64, 8, 2),
        (128, 128, 64, 8, 2),
        (128, 128, 32, 8, 2),
        (128, 128, 32, 4, 2),
        (64, 128, 64, 4, 2),
    ),
    ("sm", 32): ((64, 128, 16, 8, 2), (128, 128, 16, 8, 2), (64, 64, 16, 4, 2), (64, 64, 32, 4, 3)),
    ("gfx", 32): ((64, 64, 32, 4, 2), (128, 64, 32, 4, 2), (128, 128, 16, 8, 2)),
}
SPLITS = (8, 16, 32)
DESCRIBED = ("sm_90", "sm_100", "sm_120")  # devices with a unit that copies by descriptors


def candidates(kernel: str, architecture: str, bits: int) -> Iterator[tuning.Config]:
    """The table's own row comes first, so that a search never does worse than none."""
    seen = [tuning.lookup(kernel, architecture, str(bits))]
    yield seen[0]
    family = "gfx" if architecture.startswith("gfx") else "sm"
    if kernel == "rows":
        found = [tuning.row(*x) for x in BLOCKS]
    else:
        splits = SPLITS if kernel == "logprobs" else (None,)
        ways = (False, True) if bits == 16 and architecture in DESCRIBED else (False,)
        found = [tuning.tile(*x, split=split, tma=tma) for tma in ways for x in TILES[family, bits] for split in splits]
    yield from (x for x in found if x not in seen)


def best(configs: Iterator[tuning.Config], launch: Callable[[tuning.Config], Launch], timer: Timer) -> tuning.Config:
    """The fastest; of equals the first. One that does not fit the device does not run, and is none."""
    chosen, least = None, float("inf")
    for config in configs:
        try:
            seconds = timer(launch(config))
        except (RuntimeError, triton.errors.TritonError) as error:
            print(f"luffy_kernels: {config} does not run: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        if seconds < least:
            chosen, least = config, seconds
    if chosen is None:
        raise RuntimeError("no candidate ran on this device")
    return chosen


def on_device(launch: Launch) -> float:
    """Median milliseconds, caches flushed in between."""
    return triton.testing.do_bench(launch, warmup=25, rep=100, return_mode="median")


def table_line(key: tuning.Key, config: tuning.Config) -> str:
    """A row in the syntax of `tuning.TABLE`."""
    if "BLOCK" in config:
        call = f"row({config['BLOCK']}, {config['num_warps']})"
    else:
        sizes = [str(config[k]) for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")]
        unsaid = {"SPLIT": None, "GROUP": tuning.GROUP, "TMA": False}
        sizes += [f"{k.lower()}={config[k]}" for k, value in unsaid.items() if config.get(k, value) != value]
        call = f"tile({', '.join(sizes)})"
    kernel, architecture, bucket = key
    return f'    ("{kernel}", "{architecture}", "{bucket}"): {call},'


def rows_launch(device: torch.device, padded: int, count: int, config: tuning.Config) -> Launch:
    """Statistics and bf16 gradient of `count` rows of logits: the two passes of every row kernel."""
    from .rows import grad_rows_kernel, stats_rows_kernel  # late: rows imports tuning, which imports this

    logits = torch.randn(count, padded, device=device)
    dz, out = logits.view(torch.bfloat16), torch.zeros(5, count, device=device)
    at, ones = torch.arange(count, device=device), torch.ones(count, device=device)
    flags = {"BIAS": False, "SOFTCAP": False, **config}

    def launch() -> None:
        head = (padded, padded, 0, 1.0, 1.0)
        stats_rows_kernel[(count,)](logits, None, at, at, ones, out, count, padded, *head, AVERAGE=False, **flags)
        values = (ones, ones, ones, ones, None)
        grad_rows_kernel[(count,)](
            logits, dz, None, at, at, ones, *values, padded, dz.stride(0), *head, UNIFORM=False, **flags
        )

    return launch


def tiles_launch(kernel: str, hidden: Tensor, weight: Tensor, config: tuning.Config) -> Launch:
    from .logprobs import Operands, grad_kernel, tiles_kernel  # late, as above

    (count, width), vocabulary = hidden.shape, weight.shape[0]
    at, ones = torch.arange(count, device=hidden.device), hidden.new_ones(count, dtype=torch.float32)
    rows, columns = triton.cdiv(count, config["BLOCK_M"]), config["BLOCK_N"] * config.get("SPLIT", 1)
    splits = triton.cdiv(vocabulary, columns)
    read = Operands.of(hidden, weight, at, config)
    flags = {"BIAS": False, "SOFTCAP": False} | read.flags
    tokens = (read.hidden, read.weight, None, at, at, ones)
    if kernel == "logprobs":
        partial_, found = ones.new_empty(splits, 3, count), ones.new_empty(count)
        rest = (partial_, found, count, vocabulary, width, 0, *read.strides, 1.0, 1.0)
        return lambda: tiles_kernel[(rows * splits,)](*tokens, *rest, **flags)
    coefficients, dz = ones.new_zeros(4, count), hidden.new_empty(count, splits * columns)
    last = (coefficients, dz, count, 0, vocabulary, width, 0, *read.strides, dz.stride(0), 1.0, 1.0)
    return lambda: grad_kernel[(rows * splits,)](*tokens, *last, **flags)


def row(kernel: str, device: torch.device, padded: int, timer: Timer = on_device) -> tuning.Config:
    launch = partial(rows_launch, device, padded, ROWS[kernel])
    return settle((kernel, tuning.arch(device), tuning.row_buckets(padded)[0]), 0, launch, timer)


def tile(
    kernel: str, device: torch.device, operand: torch.dtype, width: int, timer: Timer = on_device
) -> tuning.Config:
    # not zeros: a device that multiplies those draws less power, and runs faster than on any data
    hidden = torch.randn(ROWS[kernel], width, dtype=operand, device=device)
    weight = torch.randn(VOCABULARY, width, dtype=operand, device=device) * width**-0.5
    key = (kernel, tuning.arch(device), tuning.tile_buckets(operand, width)[0])
    return settle(key, 8 * operand.itemsize, partial(tiles_launch, kernel, hidden, weight), timer)


def settle(key: tuning.Key, bits: int, launch: Callable[[tuning.Config], Launch], timer: Timer) -> tuning.Config:
    """Searches for a row, keeps it in this process's table and prints it for the one in the source."""
    kernel, architecture, _ = key
    config = best(candidates(kernel, architecture, bits), launch, timer)
    tuning.TABLE[key] = config
    print(table_line(key, config), file=sys.stderr)
    return dict(config)
