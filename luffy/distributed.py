"""The process group and mesh of FSDP2, on one rank."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from luffy.errors import UserError


def init() -> tuple[DeviceMesh, torch.device]:
    """Start the process group (gloo on CPU, NCCL on a GPU) and return the data-parallel mesh and this rank's device.

    Raises:
        UserError: launched with more than one rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("train: this version trains on one rank; start it without torchrun")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # an in-memory store: no port is opened
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(minutes=30))
    return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp",)), device


def close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
