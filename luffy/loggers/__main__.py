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
from luffy.loggers.follow import SINKS, Follower
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
    if follower.lost:
        print(
            f"error: loggers: {options.logger} did not take {follower.lost} records ({follower.why})", file=sys.stderr
        )
    return 2 if follower.lost else 0


def follow(run: Path, name: str) -> int:
    """Until the trainer says, or is gone; 1 where the sink could not be opened."""
    parent = os.getppid()
    follower = Follower(run, name)
    try:
        follower.open()
    except Exception as error:
        follower.fail(error, lost=0)
        return 1
    while os.getppid() == parent and not select.select([sys.stdin], [], [], POLL_S)[0]:
        follower.hand_on()
    follower.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
