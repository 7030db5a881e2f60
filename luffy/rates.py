"""What the machine at hand is, as `luffy.machines` describes one: a GPU by its driver's name, a CPU by measuring it."""

import os
import time
from collections.abc import Callable
from dataclasses import replace

from luffy.machines import Machine, find_machine, machine_of

ROWS, WIDTH = 512, 1024
"""Of the products that are timed: a micro-batch's rows, and the width of a small model."""
COPIED = 2**26
"""Bytes, more than caches hold."""
TRIES = 5


def machine_here(dtype: str) -> tuple[Machine, str]:
    """The first GPU, or this CPU, and where its rates come from. dtype: as `model.dtype` has it."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        known, memory = machine_of(name), float(torch.cuda.mem_get_info(0)[1])
        if known is None:
            return Machine(name, memory), f"no rates are known of {name}"
        return replace(known, memory=memory), f"rates from the data sheet of {known.name}"
    flops, bandwidth = cpu_rates(dtype)
    said = (
        f"rates of this CPU measured just now, as if nothing else ran on it (its load is {os.getloadavg()[0]:.1f}): "
        f"{flops / 1e9:,.0f} GFLOP/s of products, {bandwidth / 1e9:.1f} GB/s of copies"
    )
    # ranks of one CPU talk through its memory
    machine = replace(find_machine("cpu"), flops=flops, bandwidth=bandwidth)
    return replace(machine, link=bandwidth, network=bandwidth, host=bandwidth), said


def cpu_rates(dtype: str) -> tuple[float, float]:
    """(FLOP/s of a product of this type, bytes/s read or written), the best of a few tries of some milliseconds."""
    import torch

    from luffy.dtypes import dtype_of

    kind = dtype_of(dtype)
    rows, weight = torch.ones(ROWS, WIDTH, dtype=kind), torch.ones(WIDTH, WIDTH, dtype=kind)
    source = torch.zeros(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = _best(lambda: torch.mm(rows, weight))
    return 2 * ROWS * WIDTH * WIDTH / seconds, 2 * COPIED / _best(lambda: target.copy_(source))


def _best(call: Callable[[], object]) -> float:
    """Seconds that a call takes where nothing else runs: its threads' own time, by the threads."""
    import torch

    call()
    found = []
    for _ in range(TRIES):
        began = time.process_time()
        call()
        found.append((time.process_time() - began) / torch.get_num_threads())
    return min(found)
