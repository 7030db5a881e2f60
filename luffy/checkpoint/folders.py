"""Which checkpoints a run has, and which of them is meant."""

import re
from pathlib import Path

import torch.distributed as dist

from luffy.console import say
from luffy.errors import UserError
from luffy.files import remove_folder
from luffy.manifest import damage, read_manifest, verify

LOOP, OPTIMIZER, SHARDS = "trainer/loop.json", "trainer/optimizer", "trainer/weights"
NETWORKS = "trainer/networks"
OBJECTIVE = "trainer/objective.safetensors"


def name_of(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, by its folder's name."""
    return int(checkpoint.name.removeprefix("step-"))


def all_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return [path for path in _folders(folder) if damage(path) is None]


def latest(folder: Path, before: Path | None = None) -> Path | None:
    """The newest complete checkpoint (older than `before`); incomplete ones that are newer are said and skipped."""
    for path in reversed(_folders(folder)):
        if before is not None and step_of(path) >= step_of(before):
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
    steps = ", ".join(str(step_of(path)) for path in complete)
    if which == "best":
        if (found := _best(complete)) is None:
            raise UserError(f"model: no checkpoint in {folder} has a score (eval.validation); take a step: {steps}")
        return found
    for path in complete:
        if which.isdecimal() and step_of(path) == int(which):
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
    return max(scores, key=lambda item: (item[0], step_of(item[1])))[1] if scores else None


def _folders(folder: Path) -> list[Path]:
    """Of checkpoints, complete or not, by step."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)), key=step_of)
