"""A recipe of two stages: the first trains in RUN/first, the second in RUN from the first's last checkpoint.

Both are ordinary runs; nothing but the weights goes from one to the other. A stage begins in a fresh process, so that
engine, memory and process group of the first are gone: each rank replaces itself, and its launcher sees one process.
"""

import os
import sys
from typing import Any, NoReturn

from luffy.config import Config
from luffy.errors import UserError
from luffy.rank import round_of_ranks
from luffy.run_folder import RunFolder

FIRST = "LUFFY_FIRST"
"""Of a rank that has finished the first stage: its last checkpoint. The others may not see result.json yet."""


def due(run: RunFolder, stages: list[Config], resume: bool) -> tuple[RunFolder, Config]:
    """(folder, configuration) of the stage to run now.

    Raises:
        UserError: the folders hold runs that this one cannot go on with.
    """
    last = stages[-1]
    if len(stages) == 1:
        if run.first.holds_a_run:
            raise UserError(
                f"train: {run.path} holds the first stage of two; resume it with its own recipe, or choose another "
                f"--run-dir"
            )
        return run, last
    first, checkpoint = stages[0], os.environ.get(FIRST)
    if checkpoint is None:
        run.first.check(first, resume)
        if not run.first.is_complete(first):
            if run.holds_a_run:
                raise UserError(f"train: {run.path} has begun its second stage, so the first cannot go on")
            return run.first, first
        assert run.first.result is not None
        checkpoint = run.first.result["checkpoint"]
    weights = run.first.path / checkpoint
    if not weights.is_dir():
        raise UserError(f"train: {weights}, from which the second stage begins, is gone; bring it back")
    last.model.name = f"./{weights}" if not weights.is_absolute() else str(weights)
    return run, last


def begin_second(command: list[str], result: dict[str, Any]) -> NoReturn:
    """Become the process of the second stage; command: arguments of this Python. result: the first stage's."""
    os.environ[FIRST] = result["checkpoint"]
    # the job's store still holds what the ranks of the first stage said
    os.environ["LUFFY_ROUND"] = f"{round_of_ranks()}-second"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *command])
