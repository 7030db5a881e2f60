"""Rollout engines: vLLM in this process, vLLM's servers, or what another run has sampled."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from luffy.errors import UserError

if TYPE_CHECKING:
    from luffy.config import Config
    from luffy.distributed import World
    from luffy.rollout.engine import Engine


def make_engine(
    path: str,
    config: "Config",
    *,
    eos_token_id: int,
    sizes: dict[str, int],
    max_model_len: int,
    folder: Path,
    world: "World",
    version: int,
) -> "Engine":
    """The engine that `config.rollout` asks for, with the weights at `path`, which count as `version`. Collective.

    Args:
        sizes: of the model, by the names that a server says its own by (`luffy.rollout.worker`).
        max_model_len: longest prompt and answer, tokens.
        folder: of the run, where servers leave logs and find weights.

    Raises:
        UserError: it does not start.
    """
    import torch

    from luffy import dtypes
    from luffy.rollout.replay import Recorder, Replay

    rollout = config.rollout
    options: dict[str, Any] = {
        "dtype": dtypes.resolve(rollout.dtype or config.model.dtype),
        "eos_token_id": eos_token_id,
        "max_model_len": max_model_len,
        "trust_remote_code": config.model.trust_remote_code,
        "version": version,
    }
    engine: Engine
    if rollout.replay is not None:
        return Replay(Path(rollout.replay), version)
    if rollout.engine == "colocated" and rollout.sleep and not torch.cuda.is_available():
        raise UserError("rollout.sleep: vLLM gives up memory on GPUs alone, and there is none; leave it out")
    if rollout.engine == "colocated" and world.size % rollout.tensor_parallel:
        raise UserError(
            f"rollout.tensor_parallel: {world.size} ranks cannot be split into engines of {rollout.tensor_parallel}"
        )
    if rollout.engine == "server":
        from luffy.rollout.servers import Servers

        engine = Servers(path, rollout, sizes=sizes, folder=folder, world=world, **options)
    else:
        from luffy.rollout.vllm_engine import VllmEngine

        engine = VllmEngine(path, rollout, ranks=world.size, **options)
    return Recorder(engine, folder / "rollouts" / f"rank-{world.rank}.jsonl") if rollout.record else engine
