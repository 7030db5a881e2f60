"""A model to ask, by name: a run folder, a model folder or a Hugging Face id."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luffy.errors import UserError

if TYPE_CHECKING:
    from luffy.config import Config, ModelConfig
    from luffy.prompts import PromptTemplate
    from luffy.rollout.servers import Servers
    from luffy.rollout.vllm_engine import VllmEngine

ANSWER_TOKENS = 512
"""Longest answer, unless another is asked for."""
STYLES = ("chat", "luffy", "plain")
TEMPLATES = {
    "qwen-math": "oat-zero-qwen2.5-math-7b",
    "simplerl-zero": "simplerl-zero-qwen2.5-math-7b",
    "open-reasoner-zero": "open-reasoner-zero-qwen2.5-math-7b",
    "prime-zero": "prime-zero-qwen2.5-math-7b",
}
"""Recipes whose prompts these are."""


@dataclass(frozen=True, slots=True)
class Opened:
    name: str
    path: str
    """The folder or Hugging Face id that the weights come from."""
    template: "PromptTemplate"
    config: "Config"
    """A run's own, grader included; else the defaults, and no grader."""


def open_model(
    name: str,
    *,
    checkpoint: str = "newest",
    template: str | None = None,
    memory_fraction: float | None = None,
    kv_cache_gib: float | None = None,
) -> Opened:
    """The tokenizer and how prompts are written, without the weights.

    checkpoint: of a run folder, newest, best or a step. template: of `STYLES` or `TEMPLATES`; None: the run's own, or
    the model's chat template. memory_fraction, kv_cache_gib: as `rollout` has them.

    Raises:
        UserError: there is no such model, checkpoint or chat template.
    """
    from luffy.config import Config
    from luffy.config_file import load_config
    from luffy.run_folder import RunFolder
    from luffy.sources import load_template, resolve

    config = Config()
    config.model.name, config.reward.grader = name, ""
    run = RunFolder(name)
    if run.holds_a_run:
        from luffy.checkpoint import choose  # imports torch

        config = load_config(str(run.path / "config.toml"))
        config.model.name = str(choose(run.checkpoints, checkpoint).resolve())
    elif checkpoint != "newest":
        raise UserError(f"model: --checkpoint {checkpoint} is for run folders, and {name} is none")
    set_template(config.model, template)
    if memory_fraction is not None:
        config.rollout.memory_fraction = memory_fraction
    if kv_cache_gib is not None:
        config.rollout.kv_cache_gib = kv_cache_gib
    config.rollout.sleep = False  # nobody else wants the memory, and nothing would bring the weights back
    path = resolve(config.model)
    return Opened(name, path, load_template(path, config.model), config)


def set_template(model: "ModelConfig", template: str | None) -> None:
    """How its prompts are written: as one of `STYLES`, or as the recipe of one of `TEMPLATES` says; None: as it is."""
    from luffy.config_file import load_config

    if template in TEMPLATES:
        prompts = load_config(TEMPLATES[template]).model
        model.prompt_style, model.system, model.chat_template = "chat", prompts.system, prompts.chat_template
    elif template is not None:
        model.prompt_style = template  # type: ignore[assignment]


def start_engine(model: Opened, context: int) -> "VllmEngine":
    """vLLM with its weights. context: tokens of the longest prompt and answer together.

    Raises:
        UserError: the model has fewer positions, or vLLM does not start.
    """
    from luffy import dtypes
    from luffy.rollout.vllm_engine import VllmEngine

    config = model.config
    _fitting(model, context)
    return VllmEngine(
        model.path,
        config.rollout,
        dtype=dtypes.resolve(config.rollout.dtype or config.model.dtype),
        eos_token_id=model.template.eos_token_id,
        max_model_len=context,
        trust_remote_code=config.model.trust_remote_code,
    )


@contextmanager
def start_servers(model: Opened, context: int, folder: Path) -> Iterator["Servers"]:
    """As `start_engine`, by vLLM's servers: those of `rollout.urls`, or `rollout.servers` started here, which end with
    this. folder: for their logs.

    Raises:
        UserError: a server does not start, cannot be reached, or has a model of other sizes or fewer positions.
    """
    from luffy import dtypes
    from luffy.config import MeshConfig
    from luffy.distributed import joined
    from luffy.load import identity
    from luffy.rollout.servers import Servers

    config = model.config
    if config.rollout.urls and not Path(model.path).is_dir():
        raise UserError(f"model: servers of --urls load weights from a folder that they see, and {model.path} is none")
    text = _fitting(model, context)
    with joined(MeshConfig()) as world, Servers(
        model.path,
        config.rollout,
        dtype=dtypes.resolve(config.rollout.dtype or config.model.dtype),
        eos_token_id=model.template.eos_token_id,
        sizes={
            "vocabulary": text.vocab_size,
            "hidden size": text.hidden_size,
            "blocks": text.num_hidden_layers,
        },
        max_model_len=context,
        folder=folder,
        world=world,
        trust_remote_code=config.model.trust_remote_code,
    ) as servers:  # fmt: skip
        if config.rollout.urls:
            # a version of its own, so that nothing that other weights have left in a prefix cache is taken for these
            servers.load(Path(model.path).resolve(), int(identity(model.path)[:12], 16))
        yield servers


def language_config(model: Opened) -> Any:
    """transformers' description of the language model."""
    from transformers import AutoConfig

    remote = model.config.model.trust_remote_code
    return AutoConfig.from_pretrained(model.path, trust_remote_code=remote).get_text_config()


def positions_of(described: Any) -> int | None:
    """How many vLLM takes: those in the config, times the factor by which its rotations are stretched."""
    positions = getattr(described, "max_position_embeddings", None)
    rope = getattr(described, "rope_parameters", None) or {}
    if positions is None or rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return positions
    return int((rope.get("original_max_position_embeddings") or positions) * rope.get("factor", 1))


def _fitting(model: Opened, context: int) -> Any:
    """The language model's config. Raises UserError where it has fewer positions."""
    described = language_config(model)
    positions = positions_of(described)
    if positions is not None and context > positions:
        raise UserError(
            f"model: {model.name} has {positions} positions, and {context} were asked for, for the longest prompt with "
            f"its answer; lower --max-tokens (in Python: context)"
        )
    return described
