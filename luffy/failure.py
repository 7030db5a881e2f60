"""Why a rank ended: what it tells the other ranks through the store, and the launcher above it through a file."""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from luffy.errors import UserError, first_line
from luffy.files import write_json


@dataclass(frozen=True, kw_only=True)
class Failure:
    rank: int
    message: str
    """One line."""
    code: int
    """What every rank exits with: 2 what the user can mend, 130 Ctrl-C, 1 everything else."""
    secondary: bool = False
    """A consequence of a death that this rank did not see; whoever knows better is to be believed."""
    stacks: tuple[int, ...] = ()
    """Ranks that shall print where they are."""

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Self:
        """Of the exception that ends `rank`."""
        text = first_line(error)
        if isinstance(error, UserError):
            return cls(rank=rank, message=text, code=2)
        if isinstance(error, KeyboardInterrupt):
            return cls(rank=rank, message="interrupted", code=130)
        name = type(error).__name__
        return cls(rank=rank, message=text if text == name else f"{name}: {text}", code=1)

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        known = {key: value for key, value in json.loads(text).items() if key in cls.__dataclass_fields__}
        return cls(**known | {"stacks": tuple(known.get("stacks", ()))})

    @classmethod
    def of_file(cls, data: Any) -> Self | None:
        """Of what `save` wrote, as the agent has read it; None if there is none, or another program's."""
        return cls.parse(json.dumps(data)) if isinstance(data, dict) and "code" in data else None

    def dump(self) -> str:
        return json.dumps(asdict(self))

    def as_secondary(self) -> Self:
        return replace(self, message=f"lost another rank ({self.message})", secondary=True)

    def sentence(self, ranks: int) -> str:
        return f"luffy: {self.message}" if ranks == 1 else f"luffy: rank {self.rank}: {self.message}"

    def save(self) -> None:
        """Into the file that an elastic agent (torchrun's or ours) reads when a rank has failed, if there is one."""
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            with suppress(OSError, UserError):  # it is leaving anyway; the exit code says the rest
                write_json(Path(file), asdict(self) | {"timestamp": int(time.time())})


def say_failure(error: UserError) -> None:
    """What ends a command, in a sentence: printed, or left to our launcher by a rank of it. Ranks of torchrun fail
    together here, before they could talk to each other, so one of each node prints."""
    rank = int(os.environ.get("RANK", "0"))
    Failure.of(error, rank).save()
    launched = "LUFFY_LAUNCHER" in os.environ and "RANK" in os.environ
    if not launched and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"luffy: {error}", file=sys.stderr)


def verdict(failures: dict[int, Any], ranks: int) -> tuple[str, int]:
    """(one sentence, exit code): who failed first, from what the ranks wrote down and how they ended."""
    told = [Failure.of_file(f.error_file_data) for _, f in sorted(failures.items())]
    known = [failure for failure in told if failure]
    for failure in known:
        if not failure.secondary:
            return failure.sentence(ranks), failure.code
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            name = signal.Signals(-failure.exitcode).name
            why = " (the system does that when memory runs out)" if name == "SIGKILL" else ""
            return f"luffy: rank {rank} was killed by {name}{why}", 128 - failure.exitcode
    if known:
        return known[0].sentence(ranks), known[0].code
    for rank, failure in sorted(failures.items()):
        if failure.exitcode > 0:
            return f"luffy: rank {rank} ended with exit code {failure.exitcode}; see its output above", failure.exitcode
    return f"luffy: rank {min(failures)} was ended by SIGTERM", 128 + signal.SIGTERM
