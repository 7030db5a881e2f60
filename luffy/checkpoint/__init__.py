"""Checkpoints: written in the background, whole or absent, readable by any number of ranks.

    step-000040/
      config.json, tokenizer, ...    an ordinary Hugging Face folder, float32 masters: transformers, vLLM and
      model*.safetensors             `luffy eval` open it as it is
      adapter/                       PEFT's folder, of a LoRA run: its model files hold merged weights, `model.dtype`
      trainer/optimizer/shard-*      Adam's moments, files of each rank, as torch.distributed.checkpoint writes them
      trainer/networks/shard-*       networks trained beside the policy and their moments, likewise, if there are any
      trainer/objective.safetensors  what the objective remembers, if it does
      trainer/loop.json              the loop's counters
      trainer/manifest.json          every file with its size and checksum; written last

Nothing is pickled into files, nothing unpickled.

    folders    which there are, which is the newest, the best, the one to resume; the names in one
    saving     `Checkpointer`
    loading    optimizer, networks, adapters, what the objective remembers
    state      the tensors that saving and loading agree on
"""

from luffy.checkpoint.folders import all_checkpoints, choose, latest, name_of, resumable, step_of
from luffy.checkpoint.loading import (
    load_adapters,
    load_loop,
    load_networks,
    load_optimizer,
    load_remembered,
    refuse_other_sizes,
)
from luffy.checkpoint.saving import Checkpointer

__all__ = [
    "Checkpointer",
    "all_checkpoints",
    "choose",
    "latest",
    "load_adapters",
    "load_loop",
    "load_networks",
    "load_optimizer",
    "load_remembered",
    "name_of",
    "refuse_other_sizes",
    "resumable",
    "step_of",
]
