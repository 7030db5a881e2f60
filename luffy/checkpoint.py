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

`save` copies this rank's shards to host memory and returns; a thread of every rank, with a process group of its own,
writes them with DCP, joins the weights into whole files (`consolidate.py`), and rank 0 renames the folder. No rank
holds more than its shards and the serialised shards of one file. Nothing is pickled into files, nothing unpickled.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from luffy import lora
from luffy.console import say
from luffy.consolidate import Facts, consolidate, facts
from luffy.errors import UserError
from luffy.files import disk_errors, put_in_place, remove_folder, temporary_name, write_json
from luffy.load import Shape, read_tensors, safetensors_files, stored_shapes
from luffy.manifest import damage, fingerprint, read_manifest, verify, write_manifest
from luffy.model import Policy
from luffy.networks import Network
from luffy.shards import full
from luffy.staging import Staged, save_shards
from luffy.weights import everything_of, model_weights, trained_of, weights_of

LOOP, OPTIMIZER, SHARDS = "trainer/loop.json", "trainer/optimizer", "trainer/weights"
NETWORKS = "trainer/networks"
OBJECTIVE = "trainer/objective.safetensors"
FILE_BYTES = 2 * 2**30
"""Size of a model file, bytes. A rank serialises its shards of one file at a time, so this bounds what that takes."""
TIMEOUT = timedelta(hours=2)  # of a rank that waits while another writes


class Checkpointer:
    """Writes the checkpoints of a run into `folder`, the newest `keep` of them, and the best one too if `best` names
    what `score` is. Made, used and closed by all ranks together."""

    def __init__(self, folder: Path, keep: int, *, best: str | None = None) -> None:
        self.folder, self.keep, self.best = folder, keep, best
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        # a thread starts out on GPU 0, and DCP asks for the stream of the device it is on
        device = torch.cuda.current_device() if torch.cuda.is_available() else -1
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=torch.cuda.set_device, initargs=(device,))
        self._pending: Future[None] | None = None

    def save(
        self,
        step: int,
        policy: Policy,
        optimizer: Optimizer,
        loop: dict[str, Any],
        tokenizer,
        score: float | None = None,
        remembered: Mapping[str, Tensor] | None = None,
        networks: Sequence[Network] = (),
    ) -> None:
        """Copy the state and return; the writing goes on in the background. Collective over all ranks.

        loop: of rank 0, JSON. score: higher is better; a checkpoint without one is never the best. remembered: by the
        objective, of rank 0, on the CPU; nobody changes it. networks: beside the policy; frozen ones are not saved.

        Raises:
            UserError: the previous writing failed, or this one cannot begin (disk full, not writable); checkpoints that
                were complete are as they were.
        """
        self.wait()
        target = self.folder / name_of(step)
        tensors = weights_of(policy)
        try:
            with torch.no_grad():
                adapters = {name: full(tensor).cpu() for name, tensor in lora.adapters_of(policy.lm).items()}
                begin = partial(_begin, temporary_name(target), policy, adapters, loop | {"step": step}, tokenizer)
                self._everywhere(begin, only_rank_0=True)
                moments = optimizer_tensors(trained_of(policy), optimizer)
                work = _Work(
                    target=target,
                    step=step,
                    score=score,
                    shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
                    weights={name: Staged.copy_of(name, tensor) for name, tensor in model_weights(policy)},
                    moments={name: Staged.copy_of(name, tensor) for name, tensor in moments.items()},
                    networks={name: Staged.copy_of(name, tensor) for name, tensor in network_tensors(networks).items()},
                    architecture=type(policy.lm).__name__,
                    remembered=remembered or {},
                )
        except BaseException:
            self._discard(temporary_name(target))
            raise
        self._pending = self._thread.submit(self._write, work)

    def wait(self) -> None:
        """Until the last save is on the disk. Collective over all ranks.

        Raises:
            UserError: it could not be written; checkpoints that were complete are as they were.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let a writing that is under way finish; what goes wrong there is said, not raised."""
        try:
            self.wait()
        except Exception as error:
            say(f"the last checkpoint was not written: {error}")
        self._thread.shutdown()
        if dist.is_initialized():
            dist.destroy_process_group(self._group)

    def _write(self, work: "_Work") -> None:
        try:
            files = self._write_shards(work)
            self._everywhere(lambda: self._finish(work, files), only_rank_0=True)
        except BaseException:
            self._discard(work.temporary)
            raise

    def _write_shards(self, work: "_Work") -> dict[str, Facts]:
        """Weights as whole files, moments as shards; size and checksum of each, whoever wrote it."""
        numbers = save_shards(work.weights, work.temporary / SHARDS, FILE_BYTES, self._group)
        if work.moments:  # there are none before the first update
            save_shards(work.moments, work.temporary / OPTIMIZER, FILE_BYTES, self._group)
        if work.networks:
            save_shards(work.networks, work.temporary / NETWORKS, FILE_BYTES, self._group)
        last = max(numbers.values())
        work.files_of = {name: _model_file(number, last) for name, number in numbers.items()}

        def of_this_rank() -> dict[str, Facts]:
            mine = f"shard-{self._rank + 1:05d}-*"
            folders = (OPTIMIZER, NETWORKS)
            shards = {f"{name}/{path.name}": path for name in folders for path in (work.temporary / name).glob(mine)}
            found = {name: facts(path) for name, path in sorted(shards.items())}
            for number in range(1 + self._rank, 1 + last, self._world):
                shapes = {name: work.shapes[name] for name in numbers if numbers[name] == number}
                parts = (work.temporary / SHARDS).glob(f"shard-*-model-{number:05d}-of-*")
                name = _model_file(number, last)
                found[name] = consolidate(parts, shapes, work.temporary / name)
            return found

        files: dict[str, Facts] = {}
        for found in self._everywhere(of_this_rank):
            files |= found
        return files

    def _finish(self, work: "_Work", files: dict[str, Facts]) -> None:
        """Rank 0: the manifest, the rename, and older checkpoints away."""
        shutil.rmtree(work.temporary / SHARDS)
        if work.remembered:
            save_file(dict(work.remembered), work.temporary / OBJECTIVE)
        if len(names := set(work.files_of.values())) > 1:
            index = {"metadata": {"total_size": sum(int(files[name]["bytes"]) for name in names)}}
            write_json(work.temporary / SAFE_WEIGHTS_INDEX_NAME, index | {"weight_map": work.files_of})
        for path in work.temporary.rglob("*"):
            name = str(path.relative_to(work.temporary))
            if path.is_file() and name not in files:
                files[name] = facts(path)
        score = {"by": self.best, "value": work.score if work.score is None or math.isfinite(work.score) else None}
        model = fingerprint(work.architecture, work.shapes)
        write_manifest(work.temporary, files, step=work.step, world_size=self._world, score=score, model=model)
        put_in_place(work.temporary, work.target)
        if problem := damage(work.target):
            raise UserError(
                f"{problem} right after it was written; the disk or mount does not keep what it is given, "
                f"so resume on another one"
            )
        prune(self.folder, self.keep, best=self.best is not None)

    def _everywhere(self, act: Callable[[], Any], only_rank_0: bool = False) -> list[Any]:
        """act() on every rank (or rank 0) -> the results by rank; what fails on one rank fails on all of them."""
        result = failure = None
        try:
            if self._rank == 0 or not only_rank_0:
                with disk_errors("checkpoint"):
                    result = act()
        except Exception as error:
            failure = error
        answers: list[Any] = [None] * self._world
        said = None if failure is None else str(failure) or type(failure).__name__
        dist.all_gather_object(answers, (result, said), group=self._group)
        if failure is not None:
            raise failure
        for rank, (_, said) in enumerate(answers):
            if said is not None:
                raise UserError(f"on rank {rank}: {said}")
        return [result for result, _ in answers]

    def _discard(self, temporary: Path) -> None:
        if self._rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


@dataclass(slots=True, kw_only=True)
class _Work:
    """One save, from the copies to the rename."""

    target: Path
    step: int
    score: float | None
    architecture: str
    shapes: dict[str, Shape]
    weights: dict[str, Staged]
    moments: dict[str, Staged]
    networks: dict[str, Staged]
    remembered: Mapping[str, Tensor]
    files_of: dict[str, str] = field(default_factory=dict)
    """Weight -> name of its file."""

    @property
    def temporary(self) -> Path:
        return temporary_name(self.target)


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def all_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return [path for path in _folders(folder) if damage(path) is None]


def latest(folder: Path, before: Path | None = None) -> Path | None:
    """The newest complete checkpoint (older than `before`); incomplete ones that are newer are said and skipped."""
    for path in reversed(_folders(folder)):
        if before is not None and _step(path) >= _step(before):
            continue
        if (problem := damage(path)) is None:
            return path
        say(f"{problem}; it is skipped")
    return None


def choose(folder: Path, which: str) -> Path:
    """The `newest` complete checkpoint, the `best` by score (of equals the newest), or that of a step.

    Raises:
        UserError: there is none such.
    """
    if (newest := latest(folder)) is None:
        raise UserError(f"model: {folder.parent} is a run folder without a checkpoint")
    if which == "newest":
        return newest
    complete = all_checkpoints(folder)
    steps = ", ".join(str(_step(path)) for path in complete)
    if which == "best":
        if (found := _best(complete)) is None:
            raise UserError(f"model: no checkpoint in {folder} has a score (eval.validation); take a step: {steps}")
        return found
    for path in complete:
        if which.isdecimal() and _step(path) == int(which):
            return path
    raise UserError(f"model: --checkpoint must be newest, best or one of the steps {steps}, got {which}")


def resumable(folder: Path) -> Path | None:
    """The newest checkpoint of which every file has its checksum; None where there is none at all.

    One whose contents are damaged is said, and set aside under another name: it must not count as the newest again, nor
    push out those that the run writes from an earlier step on. Collective: rank 0 looks, the ranks share the reading,
    and all get the same answer.

    Raises:
        UserError: there are checkpoints, and none can be used.
    """
    several = dist.is_initialized() and dist.get_world_size() > 1
    path: Path | None = None
    while True:
        found = [latest(folder, before=path) if not several or dist.get_rank() == 0 else None]
        if several:
            dist.broadcast_object_list(found)
        if (path := found[0]) is None:
            break
        try:
            verify(path)
            return path
        except UserError as error:
            aside = path.with_name(f"damaged-{path.name}")
            say(f"{error}; it is skipped, and called {aside.name} from now on")
            if not several or dist.get_rank() == 0:
                if aside.exists():
                    remove_folder(aside)
                path.rename(aside)
    unusable = [[entry.name for entry in (*_folders(folder), *folder.glob("damaged-step-*"))]]
    if several:
        dist.broadcast_object_list(unusable)
    if unusable[0]:
        raise UserError(
            f"resume: none of the checkpoints in {folder} can be used ({', '.join(unusable[0])}); if the disk is only "
            f"away for a while, try again, else move them elsewhere to start from the beginning"
        )
    return None


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
    """
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
    """Fill the optimizer's state, whatever number of ranks saved it. Collective over all ranks. The model itself is
    loaded from the same folder like any other.

    Raises:
        UserError: the checkpoint is of another model, or damaged.
    """
    _refuse_other_model(checkpoint, policy, weights_of(policy))
    files = sorted((checkpoint / OPTIMIZER).glob("*.safetensors"))
    saved = stored_shapes(files, f"checkpoint {checkpoint.name}")  # of shards, so the names alone say something
    target = _moments_to_fill(trained_of(policy), optimizer, saved)
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
            tensors = _named(network)
            if missing := [name for name in tensors if name not in saved]:
                raise UserError(f"{what}: it has no {missing[0]}; resume with the run's own objective")
            target |= tensors | _moments_to_fill(tensors, network.optimizer, saved)
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


def optimizer_tensors(params: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """`NAME.step` [1], `NAME.exp_avg` and `NAME.exp_avg_sq` of every parameter that has been updated."""
    return {
        f"{name}.{key}": value if value.dim() else value.reshape(1)
        for name, param in params.items()
        for key, value in optimizer.state.get(param, {}).items()
    }


def network_tensors(networks: Sequence[Network]) -> dict[str, Tensor]:
    """`NETWORK.NAME` of every weight of those that are trained, and `optimizer_tensors` of them."""
    found: dict[str, Tensor] = {}
    for network in networks:
        if network.optimizer is not None:
            found |= (tensors := _named(network)) | optimizer_tensors(tensors, network.optimizer)
    return found


def _named(network: Network) -> dict[str, Tensor]:
    return {f"{network.name}.{name}": tensor for name, tensor in everything_of(network.model).items()}


def _moments_to_fill(
    params: Mapping[str, Tensor], optimizer: Optimizer, saved: Mapping[str, Shape]
) -> dict[str, Tensor]:
    """Give the optimizer an empty state of what has one in the files, named as `optimizer_tensors` names it."""
    target: dict[str, Tensor] = {}
    for name, param in params.items():
        if f"{name}.step" not in saved:
            continue  # no update had been made when it was saved
        step = torch.zeros(1, dtype=torch.float32, device=param.device)
        state = {"step": step[0], "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
        target |= {f"{name}.step": step, **{f"{name}.{key}": state[key] for key in ("exp_avg", "exp_avg_sq")}}
        optimizer.state[param] = state
    return target


def prune(folder: Path, keep: int, *, best: bool) -> None:
    """Remove complete checkpoints but the newest `keep` and, if `best`, the one of the highest score (of equals, the
    newest). Damaged ones stay: nobody knows what they are."""
    complete = all_checkpoints(folder)
    kept = set(complete[-keep:])
    if best and (found := _best(complete)):
        kept.add(found)
    for path in complete:
        if path not in kept:
            remove_folder(path)


def _best(complete: list[Path]) -> Path | None:
    scores = [(value, path) for path in complete if (value := read_manifest(path)["score"]["value"]) is not None]
    return max(scores, key=lambda item: (item[0], _step(item[1])))[1] if scores else None


def _begin(folder: Path, policy: Policy, adapters: Mapping[str, Tensor], loop: dict[str, Any], tokenizer) -> None:
    """The small files, at once: the tokenizer and the loop go on changing."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "trainer").mkdir(parents=True)
    config, generation = policy.lm.config, policy.lm.generation_config
    config.architectures = config.architectures or [type(policy.lm).__name__]
    config.save_pretrained(folder)
    generation.eos_token_id = tokenizer.eos_token_id  # what generation stopped on in training
    generation.save_pretrained(folder)
    _save_tokenizer(tokenizer, folder)
    if adapters:
        lora.save(folder / lora.FOLDER, policy.lm, adapters)
    write_json(folder / LOOP, loop)


def _save_tokenizer(tokenizer, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the Rust half knows no OSError: "File too large (os error 27)"
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), "the tokenizer") from error
        raise


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


def _model_file(number: int, last: int) -> str:
    return SAFE_WEIGHTS_NAME if last == 1 else f"model-{number:05d}-of-{last:05d}.safetensors"


def _folders(folder: Path) -> list[Path]:
    """Of checkpoints, complete or not, by step."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
