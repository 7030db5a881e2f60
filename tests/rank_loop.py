"""A rank that loops as the trainer does, for tests of the watchdog and the launcher:

    python rank_loop.py FOLDER STEPS [TROUBLE ...]      TROUBLE: kind:rank:step, of the first start only

Each step is a `rollout` of 0.1 s and a `gather` by gloo. It leaves FOLDER/pid-R, FOLDER/steps-R (one number a line)
and, when it saves, FOLDER/saved. With FOLDER/slow present a rollout takes 2 s.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from luffy import rank as ranks
from luffy.errors import UserError
from luffy.interrupt import StopOnInterrupt, Stopped
from luffy.watchdog import Watchdog


def main() -> int:
    ranks.become_rank()
    folder, steps, trouble = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    store = dist.PrefixStore(ranks.round_of_ranks(), next(dist.rendezvous("env://"))[0])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    stop = StopOnInterrupt()
    times = {"hang_s": setting("HANG_S"), "lost_s": setting("LOST_S"), "poll_s": 0.3, "quorum_s": 3.0}
    with Watchdog(store, rank, size, stop, **times) as watch, watch.together():
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
        with stop:
            for step in range(1, steps + 1):
                watch.phase("rollout", step)
                make_trouble([] if ranks.restarted() else trouble, rank, step)
                time.sleep(2.0 if (folder / "slow").exists() else 0.1)
                watch.phase("gather")
                agreed = torch.tensor([stop.asked, stop.preempted], dtype=torch.int32)
                dist.all_reduce(agreed, dist.ReduceOp.MAX)
                with (folder / f"steps-{rank}").open("a") as file:
                    file.write(f"{step}\n")
                if agreed[0]:
                    break
            watch.phase("save")
            if rank == 0:
                (folder / "saved").write_text(str(step))
            dist.barrier()
        if agreed[0]:
            raise Stopped(preempted=bool(agreed[1]))
    return 0


def setting(name: str) -> float:
    return float(os.environ.get(name, "60"))


def make_trouble(troubles: list[str], rank: int, step: int) -> None:
    for trouble in troubles:
        kind, who, when = trouble.split(":")
        if (int(who), int(when)) == (rank, step):
            if kind == "bug":
                raise IndexError("the fourth of three\nand more")
            if kind == "user":
                raise UserError("data: rows.parquet has no column prompt")
            if kind == "sleep":
                time.sleep(600)
            if kind == "kill":
                os.kill(os.getpid(), 9)
            if kind == "child":  # a process in the rank's own group, as vLLM starts them
                subprocess.Popen(["sleep", "600"])


if __name__ == "__main__":
    try:
        code = main()
    except Stopped as stopped:
        code = ranks.exit_code(stopped)
    sys.stdout.flush()
    os._exit(code)  # as tests/ranks.py: a late thread of gloo aborts an interpreter that ends
