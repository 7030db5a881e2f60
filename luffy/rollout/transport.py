"""Weights as files: a folder for each version, written a layer at a time. It always works: between machines, for any
number of servers, and a server that is started again begins with the newest version.
"""

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from luffy.files import disk_errors, new_folder, write_json

LAYER = re.compile(r"(.*?\.\d+)\.")


def version_folder(parent: Path, version: int) -> Path:
    return parent / f"version-{version:06d}"


def write_version(folder: Path, weights: Iterator[tuple[str, Tensor]], config: PreTrainedConfig, *, write: bool) -> int:
    """Write a model folder without a tokenizer: a file for each block, one for each tensor outside of them. Returns the
    number of tensors.

    Every rank walks through `weights`, because gathering them is collective; the one that may `write` does. No more
    than one block, and the tensor that follows it, is held at a time.

    Raises:
        UserError: the disk is full or not writable.
    """
    if not write:
        return sum(1 for _ in weights)
    files: dict[str, str] = {}
    with disk_errors(f"rollout: the weights in {folder.parent}"), new_folder(folder, flush=False) as temporary:
        config.save_pretrained(temporary)
        for number, (_, layer) in enumerate(groupby(weights, key=lambda named: _layer_of(named[0]))):
            tensors = {name: tensor.contiguous().cpu() for name, tensor in layer}
            file = f"model-{number:05d}.safetensors"
            save_file(tensors, temporary / file, {"format": "pt"})
            files |= dict.fromkeys(tensors, file)
        write_json(temporary / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {}, "weight_map": files})
    return len(files)


def _layer_of(name: str) -> str:
    found = LAYER.match(name)
    return found[1] if found else name
