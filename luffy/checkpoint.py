"""Checkpoints that are also Hugging Face model folders.

    step-000040/  config.json, model.safetensors (float32 masters), tokenizer    loadable by transformers and vLLM
        trainer/  optimizer.safetensors                                          Adam's moments by parameter name
                  loop.json                                                      step, data cursor, counters

The optimizer's file has a folder of its own because vLLM takes every safetensors file beside the model's for weights.

Tensors travel as safetensors, the rest as JSON: nothing is ever unpickled. A checkpoint is written beside and renamed,
so a full disk or a kill leaves the previous one untouched. Rollout sampling needs no saved generator: seeds are a
function of (seed, step, prompt).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from luffy.errors import UserError
from luffy.files import disk_errors, new_folder, write_json
from luffy.model import Policy, full, hf_weights

MODEL, OPTIMIZER, LOOP = "model.safetensors", "trainer/optimizer.safetensors", "trainer/loop.json"


def save(
    folder: Path, step: int, policy: Policy, optimizer: Optimizer, loop: dict[str, Any], tokenizer, keep: int
) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest `keep`.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are as they were.
    """
    target = folder / f"step-{step:06d}"
    with disk_errors("checkpoint"), new_folder(target) as new:
        (new / "trainer").mkdir()
        _save_tensors(dict(hf_weights(policy)), new / MODEL)
        _save_tensors(dict(_optimizer_tensors(policy, optimizer)), new / OPTIMIZER)
        policy.lm.config.save_pretrained(new)
        policy.lm.generation_config.eos_token_id = tokenizer.eos_token_id  # what generation stopped on in training
        policy.lm.generation_config.save_pretrained(new)
        tokenizer.save_pretrained(new)
        write_json(new / LOOP, loop | {"step": step})
    for old in all_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def all_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / LOOP).is_file())


def latest(folder: Path) -> Path | None:
    found = all_checkpoints(folder)
    return found[-1] if found else None


def load_loop(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / LOOP).read_text())


def load_optimizer(checkpoint: Path, policy: Policy, optimizer: Optimizer) -> None:
    """Fill the optimizer's state. The model itself is loaded from the same folder like any other."""
    try:
        saved = load_file(checkpoint / OPTIMIZER)
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint: {checkpoint / OPTIMIZER} cannot be read: {error}") from error
    for name, param in policy.named_parameters():
        if f"{name}.step" not in saved:
            continue  # no update had been made when it was saved
        state = optimizer.state[param]
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = _like(saved[f"{name}.{key}"], param)
        state["step"] = saved[f"{name}.step"]


def _like(value: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    if isinstance(param, DTensor):
        return distribute_tensor(value, param.device_mesh, param.placements)
    return value.to(param.device)


def _optimizer_tensors(policy: Policy, optimizer: Optimizer):
    for name, param in policy.named_parameters():
        for key, value in optimizer.state[param].items():
            yield f"{name}.{key}", full(value)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"}
        )
    except SafetensorError as error:  # its own I/O errors carry no errno
        raise UserError(
            f"checkpoint: {path.name} could not be written: {error}; earlier checkpoints are intact"
        ) from error
