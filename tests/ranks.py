"""Runs a function on several gloo ranks, each a process of its own."""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(world: int, fn, *args) -> None:
    """fn(rank, world, *args) in every process; an assertion that fails there fails here, with its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (world, Path(folder, "store").as_uri(), fn, args), nprocs=world)


def _enter(rank: int, world: int, store: str, fn, args: tuple) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        fn(rank, world, *args)
    finally:
        dist.destroy_process_group()
    # Everything held. Leave without the interpreter's own end: FSDP2 keeps gloo's threads alive, and a late one of them
    # aborts the process when it finds no interpreter (seen now and then, torch 2.13).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
