"""Fill a trainer from a checkpoint, whatever number of ranks wrote it.

The model itself is loaded from the same folder like any other.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer

from luffy import lora
from luffy.checkpoint.folders import LOOP, NETWORKS, OBJECTIVE, OPTIMIZER
from luffy.checkpoint.state import moments_to_fill, named
from luffy.errors import UserError
from luffy.load import read_tensors, safetensors_files, stored_shapes
from luffy.manifest import fingerprint, read_manifest
from luffy.model import Policy
from luffy.networks import Network
from luffy.weights import trained_of, weights_of


def refuse_other_sizes(checkpoint: Path, found: Any, base: Any) -> None:
    """Before anything is loaded from the folder as from any model's. found, base: transformers' configs of the
    checkpoint and of the run's model.

    Raises:
        UserError: the checkpoint is of another model than the run.
    """
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        theirs, ours = getattr(found, name), getattr(base, name)
        if theirs != ours:
            raise UserError(
                f"resume: {checkpoint.name} is of another model: its {name} is {theirs}, and {ours} that of the run's "
                f"model.name; take it out of {checkpoint.parent}, and --resume goes on from the one before"
            )


def load_loop(checkpoint: Path) -> dict[str, Any]:
    """The loop's counters.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return json.loads((checkpoint / LOOP).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint: {checkpoint.name}/{LOOP} cannot be read: {error}") from error


def load_remembered(checkpoint: Path) -> dict[str, Tensor]:
    """What the objective remembered; nothing, where it was one that does not.

    Raises:
        UserError: it cannot be read.
    """
    path = checkpoint / OBJECTIVE
    try:
        return load_file(path) if path.exists() else {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint: {checkpoint.name}/{OBJECTIVE} cannot be read: {error}") from error


def load_optimizer(checkpoint: Path, policy: Policy, optimizer: Optimizer) -> None:
    """Fill the optimizer's state. Collective over all ranks.

    Raises:
        UserError: the checkpoint is of another model, or damaged.
    """
    _refuse_other_model(checkpoint, policy, weights_of(policy))
    files = sorted((checkpoint / OPTIMIZER).glob("*.safetensors"))
    saved = stored_shapes(files, f"checkpoint {checkpoint.name}")  # of shards, so the names alone say something
    target = moments_to_fill(trained_of(policy), optimizer, saved)
    if saved and not target:
        raise UserError(
            f"checkpoint: {checkpoint.name} has moments of other parameters; resume with the run's model.lora"
        )
    if target:
        read_tensors(target, files, f"checkpoint {checkpoint.name}")


def load_networks(checkpoint: Path, networks: Sequence[Network]) -> None:
    """Fill the networks that are trained beside the policy, and their optimizers' states, whatever number of ranks
    saved them. Collective over all ranks.

    Raises:
        UserError: the checkpoint lacks one, has another one, or a damaged one.
    """
    what = f"checkpoint {checkpoint.name}"
    files = sorted((checkpoint / NETWORKS).glob("*.safetensors"))
    saved = stored_shapes(files, what)
    target: dict[str, Tensor] = {}
    for network in networks:
        if network.optimizer is not None:
            tensors = named(network)
            if missing := [name for name in tensors if name not in saved]:
                raise UserError(f"{what}: it has no {missing[0]}; resume with the run's own objective")
            target |= tensors | moments_to_fill(tensors, network.optimizer, saved)
    if target:
        read_tensors(target, files, what)


def load_adapters(checkpoint: Path, policy: Policy) -> None:
    """Fill LoRA's adapters, whatever number of ranks saved them. Collective over all ranks.

    Raises:
        UserError: the checkpoint has none, others, or damaged ones.
    """
    file, what = checkpoint / lora.FOLDER / lora.FILE, f"checkpoint {checkpoint.name}"
    adapters = lora.adapters_of(policy.lm)
    if not file.is_file():
        raise UserError(f"{what}: it has no adapters; resume with the run's own model.lora")
    saved = stored_shapes([file], what)
    for name in sorted({*adapters, *saved}):
        found, wanted = saved.get(name), tuple(adapters[name].shape) if name in adapters else None
        if found != wanted:
            raise UserError(
                f"{what}: its adapter {name} has shape {found or 'nothing'} and this run's {wanted or 'nothing'}; "
                f"resume with the run's own model.lora"
            )
    read_tensors(adapters, [file], what)


def _refuse_other_model(checkpoint: Path, policy: Policy, tensors: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    architecture = type(policy.lm).__name__
    written = read_manifest(checkpoint)["model"]
    if written == fingerprint(architecture, shapes):
        return
    stored = stored_shapes(safetensors_files(str(checkpoint)), f"checkpoint {checkpoint.name}")
    for name in [*shapes, *stored]:
        if shapes.get(name) != stored.get(name):
            raise UserError(
                f"checkpoint: {checkpoint.name} is of another model: {name} has shape {stored.get(name, 'nothing')} "
                f"there and {shapes.get(name, 'nothing')} in this {architecture}; resume with the run's own settings"
            )
    raise UserError(
        f"checkpoint: {checkpoint.name} is of a {written.get('architecture')}, and this is a {architecture}; "
        f"resume with the run's own settings"
    )
