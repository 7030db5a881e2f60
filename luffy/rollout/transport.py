"""The policy's weights on their way to servers, a layer at a time: as files, a folder for each version. It always
works: between machines, for any number of servers, and a server that is started again begins with the newest version.
`broadcast.py` has the other way.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from luffy.files import disk_errors, new_folder, write_json

LAYER = re.compile(r"(.*?\.\d+)\.")
Named = tuple[str, Tensor]


def layers(weights: Iterable[Named]) -> Iterator[list[Named]]:
    """Blocks, and tensors outside of them each by itself, gathered whole before anything is done with them: whoever
    sends them may do so on streams of its own, while the other ranks only gather. `weights` is in layer order; held at
    a time are one block and the tensor that follows it."""
    for _, layer in groupby(weights, key=lambda named: _layer_of(named[0])):
        gathered = list(layer)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        yield gathered
        gathered.clear()


def version_folder(parent: Path, version: int) -> Path:
    return parent / f"version-{version:06d}"


def write_version(folder: Path, weights: Iterator[Named], config: PreTrainedConfig, *, write: bool) -> int:
    """Write a model folder without a tokenizer: a file for each block, one for each tensor outside of them. Returns the
    number of tensors.

    Every rank walks through `weights`, because gathering them is collective; the one that may `write` does. It writes
    on after an error too, which it raises at the end: ranks that gather would wait for it.

    Raises:
        UserError: the disk is full or not writable.
    """
    if not write:
        return sum(1 for _ in weights)
    try:
        files: dict[str, str] = {}
        with disk_errors(f"rollout: the weights in {folder.parent}"), new_folder(folder, flush=False) as temporary:
            config.save_pretrained(temporary)
            for number, layer in enumerate(layers(weights)):
                tensors = {name: tensor.contiguous().cpu() for name, tensor in layer}
                file = f"model-{number:05d}.safetensors"
                save_file(tensors, temporary / file, {"format": "pt"})
                files |= dict.fromkeys(tensors, file)
            write_json(temporary / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {}, "weight_map": files})
        return len(files)
    finally:
        drain(weights)


def drain(weights: Iterator[Named]) -> None:
    """Take part in the gathering of what is left."""
    for _ in weights:
        pass


def _layer_of(name: str) -> str:
    found = LAYER.match(name)
    return found[1] if found else name
