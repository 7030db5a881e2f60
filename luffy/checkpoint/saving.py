"""Copy this rank's state to host memory and return; a thread writes it.

The thread of every rank, with a process group of its own, writes shards with DCP, joins the weights into whole files
(`luffy.consolidate`), and rank 0 renames the folder. No rank holds more than its shards and the serialised shards of
one file.
"""

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
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from luffy import lora
from luffy.checkpoint.folders import LOOP, NETWORKS, OBJECTIVE, OPTIMIZER, SHARDS, name_of, prune
from luffy.checkpoint.state import network_tensors, optimizer_tensors
from luffy.console import say
from luffy.consolidate import Facts, consolidate, facts
from luffy.errors import UserError
from luffy.files import disk_errors, put_in_place, temporary_name, write_json
from luffy.load import Shape
from luffy.manifest import damage, fingerprint, write_manifest
from luffy.model import Policy
from luffy.networks import Network
from luffy.shards import full
from luffy.staging import Staged, save_shards
from luffy.weights import model_weights, trained_of, weights_of

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


def _model_file(number: int, last: int) -> str:
    return SAFE_WEIGHTS_NAME if last == 1 else f"model-{number:05d}-of-{last:05d}.safetensors"
