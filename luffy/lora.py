"""LoRA (arXiv 2106.09685) through PEFT: y = W x + (alpha / rank) B A x, with W frozen in the compute type and A, B
trained as float32 masters.

The head is never adapted, so that the loss has no dW to compute. Outside of training nobody sees adapters: the engine,
model files and evaluation get W + (alpha / rank) B A (`luffy.weights`). Checkpoints hold the adapters as well, in
PEFT's own layout.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from luffy.config import LoraConfig
from luffy.errors import UserError, user_errors
from luffy.seeds import derive
from luffy.shards import fill

FOLDER, FILE = "adapter", "adapter_model.safetensors"
ADAPTER, BASE = "default", ".base_layer."
PREFIX = "base_model.model."  # of every name in PEFT's files


def adapt(lm: PreTrainedModel, config: LoraConfig, dtype: torch.dtype, base: str) -> None:
    """Give linear layers of `lm`'s blocks adapters, in place, and freeze all else as `dtype`. Adapters begin without
    values that mean anything: `initialise`, or a checkpoint, has them.

    base: the model that the adapters belong to, as their folder will name it.

    Raises:
        UserError: PEFT is not installed, a target is no linear layer of the blocks, or experts would stay as they are.
    """
    try:
        from peft import LoraConfig as Settings
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise UserError(
            "model.lora: PEFT is not installed; install the `lora` extra of luffy-rl, or leave model.lora.rank null"
        ) from error
    wanted = _layers(lm, config.targets)
    settings = Settings(
        r=config.rank or 0,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number will do
        target_modules=sorted({name.rsplit(".", 1)[-1] for name in wanted}),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    with user_errors("model.lora"):
        inject_adapter_in_model(settings, lm)
    found = {name for name, module in lm.named_modules() if hasattr(module, "base_layer")}
    if found != wanted:  # PEFT has rules of its own for some families
        odd = min(found ^ wanted)
        raise UserError(f"model.lora: PEFT cannot adapt {odd} of this model as asked; name other model.lora.targets")
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if not is_adapter(name):
            parameter.data = parameter.data.to(dtype)
    lm.config.dtype = dtype


def _layers(lm: PreTrainedModel, targets: list[str] | None) -> set[str]:
    """Names of the linear layers of the blocks, or of those called as in `targets`."""
    blocks = {id(module) for block in lm.get_decoder().layers for module in block.modules()}
    inside = {name: module for name, module in lm.named_modules() if id(module) in blocks}
    linear = {name for name, module in inside.items() if isinstance(module, nn.Linear)}
    known = {name.rsplit(".", 1)[-1] for name in linear}
    if unknown := [target for target in targets or () if target not in known]:
        raise UserError(
            f"model.lora.targets: {unknown[0]} is no linear layer of the blocks; known: {', '.join(sorted(known))}"
        )
    if targets is None:
        wide = [name for name, module in inside.items() for p in module.parameters(recurse=False) if p.dim() > 2]
        if wide:
            raise UserError(
                f"model.lora: {wide[0]} holds experts, which adapters of linear layers leave out; name "
                f"model.lora.targets"
            )
    return {name for name in linear if targets is None or name.rsplit(".", 1)[-1] in targets}


def adapted(lm: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, PEFT's layer) of every layer that has an adapter."""
    return ((name, module) for name, module in lm.named_modules() if ADAPTER in getattr(module, "lora_A", ()))


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def adapters_of(lm: PreTrainedModel) -> dict[str, Tensor]:
    """Name in PEFT's files -> parameter, sharded where FSDP2 shards; {} without LoRA."""
    suffix = f".{ADAPTER}.weight"
    return {
        PREFIX + name.removesuffix(suffix) + ".weight": parameter
        for name, parameter in lm.named_parameters()
        if is_adapter(name)
    }


def initialise(lm: PreTrainedModel, seed: int) -> None:
    """B = 0, so that training starts from the model itself, and A uniform within 1 / sqrt(its inputs), as PEFT has it.
    The same numbers whatever the ranks: each tensor's come from (seed, its name)."""
    with torch.no_grad():
        for name, parameter in adapters_of(lm).items():
            value = torch.zeros(parameter.shape)
            if ".lora_A." in name:
                generator = torch.Generator().manual_seed(derive(seed, "lora", name))
                value.uniform_(-1, 1, generator=generator).div_(math.sqrt(value.shape[1]))
            fill(parameter, value)


def merged(layer: Any) -> Tensor:
    """W + (alpha / rank) B A, float32; of a sharded layer the rows that this rank has of W."""
    weight, a, b = (part.weight.detach() for part in (layer.base_layer, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]))
    scale = layer.scaling[ADAPTER]
    if not isinstance(weight, DTensor):
        return weight.float() + scale * (b @ a)
    # B has the rows of W, so both are split alike; A, of `rank` rows, is gathered
    local = weight.to_local().float() + scale * (b.to_local() @ a.full_tensor())
    return DTensor.from_local(
        local, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def save(folder: Path, lm: Any, adapters: Mapping[str, Tensor]) -> None:
    """PEFT's folder: `peft.PeftModel.from_pretrained(base_model, folder)` and `vllm --lora-modules` read it.

    adapters: whole, by their names in the file.
    """
    from safetensors.torch import save_file

    folder.mkdir()
    settings = lm.peft_config[ADAPTER]
    settings.inference_mode = True
    settings.target_modules = sorted(settings.target_modules)  # a set, and sets have no order
    settings.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in adapters.items()}, folder / FILE, {"format": "pt"})
