"""Loading a model so that no rank ever holds it whole: empty first, sharded, then filled from slices of the files.

    policy = shard(Policy(empty_lm(path, config), temperature), mesh, dtype)
    load_weights(policy, path, device)
    optimizer = make_optimizer(policy, ...)     # after: loading replaces the Parameter objects

Between the two calls parameters exist on the meta device alone. Every rank then reads its own rows of each tensor from
the safetensors files (memory-mapped) and converts them to the float32 masters. LoRA's adapters are not in these files:
`lora.initialise` or `checkpoint.load_adapters` follows.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from luffy import activations, attention, body_kernels, lora
from luffy.config import ModelConfig
from luffy.console import say
from luffy.consolidate import read_header
from luffy.dtypes import dtype_of
from luffy.errors import UserError, user_errors
from luffy.files import DISK_ERRORS
from luffy.shards import fill
from luffy.weights import weights_of

if TYPE_CHECKING:
    from luffy.model import Policy

Shape = tuple[int, ...]
MIB = 2**20


def read_config(path: str, config: ModelConfig) -> PreTrainedConfig:
    """What a folder or hub id says of its model; of several modalities, the text's.

    Raises:
        UserError: nothing is found at `path`.
    """
    with user_errors(f"model {path}"):
        return AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code).get_text_config()


def empty_lm(path: str, config: ModelConfig) -> PreTrainedModel:
    """The causal LM of a folder or hub id with packed attention: float32 parameters on the meta device, real buffers.
    With `config.lora` its parameters are frozen and of `config.dtype`, and those of the adapters float32.

    Raises:
        UserError: nothing is found at `path`, it is no causal LM, its weights are quantised, or LoRA does not fit it.
    """
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    with user_errors(f"model {path}"):
        described = AutoConfig.from_pretrained(path, **options)
        if getattr(described, "quantization_config", None):
            raise UserError(f"model {path}: its weights are quantised and cannot be trained; choose the model it is of")
        with _parameters_on_meta():
            lm = AutoModelForCausalLM.from_config(
                described, dtype=torch.float32, attn_implementation=attention.register(), **options
            )
    with suppress(OSError):  # a model without one keeps what follows from its config
        lm.generation_config = GenerationConfig.from_pretrained(path)
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout"):
        if getattr(described.get_text_config(), name, 0.0):
            raise UserError(
                f"model {path}: {name} is not 0, and a run with dropout is no function of its seed; set it to 0"
            )
    if config.body_kernels == "liger":
        body_kernels.use_liger(lm)
    if config.lora.rank is not None:
        with _parameters_on_meta():
            lora.adapt(lm, config.lora, dtype_of(config.dtype), base=path)
    activations.apply(lm, config)
    return lm.eval()


def load_weights(policy: "Policy", path: str, device: torch.device, *, weights_on: torch.device | None = None) -> None:
    """Give the empty, usually sharded, `policy` the weights of a folder or hub id. Collective over all ranks.

    Parameters come to `weights_on`, which is `device` unless the shards live elsewhere (FSDP2's CPU offload), buffers
    to `device`. Parameter objects are new ones, so the optimizer is made afterwards.

    Raises:
        UserError: a file is damaged, or tensors are missing, unknown or of another shape; the first ones are named.
    """
    _materialise(policy, device, weights_on or device)
    wanted = weights_of(policy)
    with user_errors(f"model {path}"):
        files = safetensors_files(path)
        stored = stored_shapes(files, f"model {path}")
    if not stored or (_differences(wanted, stored, policy.lm) and _converted_by_transformers(policy.lm, stored)):
        say(
            f"model {path}: no safetensors files with this model's own names; every rank loads it whole, then splits it"
        )
        _load_whole(policy, path, wanted)
        return
    if problem := _differences(wanted, stored, policy.lm):
        raise UserError(f"model {path}: {problem}; its files must be those of a {type(policy.lm).__name__}")
    read_tensors(wanted, files, f"model {path}")


def safetensors_files(path: str) -> list[Path]:
    """Local paths of a model's safetensors files, downloaded if `path` is a hub id; none if it has none.

    Only what the index names counts: folders of the hub hold other layouts of the same weights beside it.
    """
    quiet: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    if whole := cached_file(path, SAFE_WEIGHTS_NAME, **quiet):
        return [Path(whole)]
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **quiet)
    if index is None:
        return []
    names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    return [Path(file) for name in names if (file := cached_file(path, name))]


def identity(path: str) -> str:
    """What tells the weights of a folder or hub id from others without reading all of them: a hash of the names and
    sizes of its files, and of 1 MiB at either end of each."""
    digest = hashlib.sha256()
    for weights in safetensors_files(path):
        size = weights.stat().st_size
        digest.update(f"{weights.name} {size}\n".encode())
        with weights.open("rb") as file:
            digest.update(file.read(MIB))
            file.seek(max(0, size - MIB))
            digest.update(file.read())
    return digest.hexdigest()


def stored_shapes(files: list[Path], what: str) -> dict[str, Shape]:
    """Name -> shape of the tensors in the files, from their headers alone.

    Raises:
        UserError: a file is not a whole safetensors file.
    """
    shapes: dict[str, Shape] = {}
    for file in files:
        try:
            header, data = read_header(file)
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"{what}: {file.name} cannot be read: {error}") from error
        if file.stat().st_size != data + max(ends, default=0):
            raise UserError(
                f"{what}: {file.name} has {file.stat().st_size} bytes and its header says "
                f"{data + max(ends, default=0)}; copy or download it again"
            )
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def read_tensors(tensors: Mapping[str, Tensor], files: list[Path], what: str) -> None:
    """Fill tensors, or this rank's shards of DTensors, from safetensors files. Collective; dtypes are converted.

    Raises:
        UserError: a file is damaged or cannot be read, on whichever rank.
    """
    with torch.no_grad(), dcp_errors(what):
        dcp.load(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_reader=_Reader(files),
            no_dist=not dist.is_initialized(),
        )


@contextmanager
def dcp_errors(what: str) -> Iterator[None]:
    """DCP's exception of all ranks as one sentence (UserError) where the user can mend it, elsewhere as RuntimeError:
    its own is no Exception."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        if isinstance(cause, SafetensorError) or (isinstance(cause, OSError) and cause.errno in DISK_ERRORS):
            raise UserError(f"{what}: on rank {rank}: {cause}") from error
        raise RuntimeError(f"{what}: on rank {rank}: {error}") from error


class _Reader(dcp.HuggingFaceStorageReader):
    """DCP's reader of a folder, kept to the files that it is given."""

    def __init__(self, files: list[Path]) -> None:
        super().__init__(str(files[0].parent))
        self.fs = _Listed(files)


class _Listed(FileSystem):
    def __init__(self, files: list[Path]) -> None:
        super().__init__()
        self.files = files

    def ls(self, path: Any) -> list[str]:
        return [str(file) for file in self.files]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters of modules made inside go to the meta device as they are registered, buffers are computed as ever.

    A `with torch.device("meta")` would take the buffers too, and nothing can say what rotary frequencies or embedding
    scales of a model from anywhere were.
    """

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # it may return one
    try:
        yield
    finally:
        hook.remove()


def _materialise(policy: "Policy", device: torch.device, weights_on: torch.device) -> None:
    buffers = [(module, *named) for module in policy.modules() for named in module.named_buffers(recurse=False)]
    policy.to_empty(device=weights_on)
    for module, name, value in buffers:  # to_empty emptied these too
        setattr(module, name, value.to(device))
    policy.lm.tie_weights()  # to_empty made one parameter for each of the names


def _differences(wanted: Mapping[str, Tensor], stored: Mapping[str, Shape], lm: PreTrainedModel) -> str | None:
    """What does not fit, the first of its kind by name; None if everything fits."""
    ignored = [r"rotary_emb\.inv_freq", *(lm._keys_to_ignore_on_load_unexpected or ())]
    missing = [name for name in wanted if name not in stored]
    extra = [
        name
        for name in stored
        if name not in wanted
        and name not in lm.all_tied_weights_keys
        and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if missing:
        return f"{_named(missing)} missing from the files" + (f", which hold {_named(extra)} instead" if extra else "")
    if extra:
        return f"the files hold {_named(extra)} that the model does not have"
    for name, tensor in wanted.items():
        if stored[name] != tuple(tensor.shape):
            return f"{name} must have shape {tuple(tensor.shape)}, got {stored[name]}"
    return None


def _named(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _converted_by_transformers(lm: PreTrainedModel, stored: Mapping[str, Shape]) -> bool:
    """Whether from_pretrained could make sense of other names: fused experts, or a body saved without its head."""
    if get_model_conversion_mapping(lm, add_legacy=False):
        return True
    return not any(name.startswith(f"{lm.base_model_prefix}.") for name in stored)


def _load_whole(policy: "Policy", path: str, wanted: Mapping[str, Tensor]) -> None:
    """What transformers makes of the files, split among the ranks; each of them holds the model for a moment."""
    try:
        with user_errors(f"model {path}"):
            loaded: Any = type(policy.lm).from_pretrained(
                path, config=policy.lm.config, dtype=torch.float32, output_loading_info=True
            )
    except RuntimeError as error:  # how transformers says that tensors do not go together, its report on many lines
        reason = next((line for line in str(error).splitlines() if line.strip()), "unknown")
        raise UserError(
            f"model {path}: its tensors cannot be converted ({reason}); copy or download it again"
        ) from error
    lm, info = loaded
    missing = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    if missing:
        raise UserError(
            f"model {path}: {_named(missing)} missing from the files; they must be of a {type(lm).__name__}"
        )
    values = lm.state_dict()
    with torch.no_grad():
        for name, tensor in wanted.items():
            fill(tensor, values[name])
