"""`python -m luffy.loggers RUN LOGGER`: hand a run to a logger, now or while it trains.

python -m luffy.loggers runs/run wandb             into the run folder
python -m luffy.loggers runs/run wandb --online    to where WANDB_*, MLFLOW_* or TRACKIO_* in the environment say
"""

import argparse
import os
import select
import sys
from pathlib import Path

from luffy.errors import UserError
from luffy.loggers.follow import SINKS, Follower, reason, write_note
from luffy.loggers.started import check_one

POLL_S = 1.0


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m luffy.loggers", description="Hand a run to a logger.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("logger", choices=list(SINKS))
    parser.add_argument("--online", action="store_true", help="let it send to where the environment says")
    parser.add_argument("--follow", action="store_true", help="go on until standard input has a line or its end")
    options = parser.parse_args(args)
    try:
        if options.follow:
            return follow(options.run, options.logger)
        check_one(options.logger, options.online)
        follower = Follower(options.run, options.logger, online=options.online, wait=False)
        follower.open()
        follower.close()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # of a library's own kind
        print(f"error: loggers: {options.logger} cannot be opened ({reason(error)})", file=sys.stderr)
        return 2
    if follower.lost:
        print(
            f"error: loggers: {options.logger} did not take {follower.lost} records ({follower.why})", file=sys.stderr
        )
    return 2 if follower.lost else 0


def follow(run: Path, name: str) -> int:
    """Until the trainer says, or is gone; 1 where anything but a record went wrong, which is noted: nobody reads what
    this process says."""
    parent, follower = os.getppid(), None
    try:
        follower = Follower(run, name)
        follower.open()
        while os.getppid() == parent and not select.select([sys.stdin], [], [], POLL_S)[0]:
            follower.hand_on()
        follower.close()
    except Exception as error:
        if follower:
            follower.fail(error, lost=0)
        else:
            write_note(run, name, why=reason(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
