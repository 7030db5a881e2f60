"""Weights & Biases: a run on disk that `wandb sync` can send, or one that is sent as it goes."""

import os

from luffy.loggers.sink import Opening


class Wandb:
    appends = False  # `wandb sync` would take a second folder of a run for the whole of it

    def __init__(self, opening: Opening) -> None:
        os.environ["WANDB_MODE"] = "online" if opening.online else "offline"
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # read when the package is imported
        os.environ.setdefault("WANDB_CACHE_DIR", str(opening.folder / "cache"))
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,  # user, host, paths, command line
            x_disable_machine_info=True,  # asks addresses of the cloud
            x_save_requirements=False,
        )
        opening.folder.mkdir(exist_ok=True)
        self._run = wandb.init(
            dir=str(opening.folder.parent),  # it appends its own name
            project=opening.project,
            name=opening.name,
            id=opening.id,
            config=opening.config,
            resume="allow" if opening.online else None,
            settings=settings,
        )
        self.last = self._run.step - 1 if opening.online else -1  # of one that goes on, it is the next

    def write(self, step: int, numbers: dict[str, float], at: float) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()
