"""From a configuration to what a run reads: model folder, tokenizer, tokenised problems."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from luffy.config import Config, ModelConfig
from luffy.data import Example, Problem, load_problems, tokenize
from luffy.embedded import cache_dir, resolve_model
from luffy.errors import UserError, user_errors
from luffy.markers import doubt
from luffy.problems import ProblemSpec, write_splits
from luffy.prompts import PromptTemplate
from luffy.wording import counted

if TYPE_CHECKING:
    from luffy.data import FilterReport


@dataclass(frozen=True, slots=True)
class Loaded:
    examples: list[Example]
    report: "FilterReport"


def load_template(path: str, config: ModelConfig) -> PromptTemplate:
    """The tokenizer at `path` and how prompts are written for it.

    Raises:
        UserError: there is none, or it lacks an EOS or a chat template that the configuration counts on.
    """
    from transformers import AutoTokenizer

    with user_errors(f"model {path}"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        own, ends = tokenizer.chat_template, _ends(path, tokenizer.eos_token_id)
        # On the tokenizer, so that checkpoints carry both
        if config.chat_template is not None:
            tokenizer.chat_template = config.chat_template
        if config.eos_token is not None:
            if config.eos_token not in tokenizer.get_vocab():
                raise ValueError(f"model.eos_token {config.eos_token!r} is not a token of the tokenizer")
            tokenizer.eos_token = config.eos_token
        template = PromptTemplate(
            tokenizer,
            style=config.prompt_style,
            system=config.system,
            chat_template=config.chat_template if config.prompt_style == "chat" else None,
            vocab_size=_vocab_size(path, config),
        )
        template.doubt = doubt(template, own if isinstance(own, str) else None, ends)
        return template


def _ends(path: str, eos: int | None) -> set[int]:
    """Ids that end an answer by the model's own files."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(path).eos_token_id
    except (ValueError, OSError):
        found = None
    return {one for one in (eos, *(found if isinstance(found, list) else [found])) if one is not None}


def _vocab_size(path: str, config: ModelConfig) -> int | None:
    """None where the tokenizer comes without a model."""
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (ValueError, OSError):
        return None
    return getattr(found.get_text_config(), "vocab_size", None)


def generated(config: Config) -> dict[str, Path]:
    """Paths of the generated splits, written on first use."""
    with user_errors("data.problems"):
        spec = ProblemSpec(**config.data.problems.model_dump())
        return write_splits(spec, cache_dir() / "problems" / spec.fingerprint()[:16])


def training_source(config: Config) -> str | Path:
    return config.data.path or generated(config)["train"]


def evaluation_sources(config: Config) -> dict[str, str | Path]:
    """Name -> source of the problem sets that a run is evaluated on: held-out, and harder ones if generated."""
    if config.eval.path is not None:
        return {"heldout": config.eval.path}
    if config.data.path is not None:
        return {}
    return {name: path for name, path in generated(config).items() if name != "train"}


def load_examples(
    source: str | Path, template: PromptTemplate, config: Config, *, split: str | None = None, limit: int | None = None
) -> Loaded:
    with user_errors("data"):
        return tokenized(load_problems(source, split=split, limit=limit), template, config)


def tokenized(problems: list[Problem], template: PromptTemplate, config: Config) -> Loaded:
    with user_errors("data"):
        limits = {"max_prompt_tokens": config.data.max_prompt_tokens, "max_trace_tokens": config.data.max_trace_tokens}
        return Loaded(*tokenize(problems, template, **limits))


@dataclass(frozen=True, slots=True)
class Sets:
    """What a run reads of problems."""

    training: Loaded
    heldout: dict[str, list[Example]]
    """That it is judged by, by name."""
    validation: list[Example]
    notes: list[str]
    """What a person should know of them, in sentences."""


def load_sets(config: Config, template: PromptTemplate) -> Sets:
    """
    Raises:
        UserError: what is wrong with them.
    """
    training = load_examples(
        training_source(config), template, config, split=config.data.split, limit=config.data.limit
    )
    have, need = len(training.examples), config.train.prompts_per_step
    if have < need:
        whence = f" of {config.data.path}" if config.data.path else ""
        lost = f" ({training.report})" if have < training.report.problems else ""
        raise UserError(
            f"data: {counted(have, 'problem')}{whence}, and a step takes {need} (train.prompts_per_step); lower it, or "
            f"bring more problems{lost}"
        )
    heldout, notes = {}, []
    for name, source in evaluation_sources(config).items():
        loaded = load_examples(source, template, config, split=config.eval.split)
        heldout[name] = loaded.examples
        if loaded.report.prompts_too_long:
            notes.append(f"{name}: {loaded.report}")
    validation = load_validation(config, template, heldout)
    judged = heldout | ({"eval.validation": validation} if validation else {})
    if said := check_overlap(config, training.examples, judged):
        notes.append(f"warning: {said}")
    if template.doubt:
        notes.append(f"warning: {template.doubt}; is that on purpose? (model.prompt_style, model.chat_template)")
    if not judged:
        notes.append("no held-out problems: set eval.path to measure accuracy before, during and after")
    return Sets(training, heldout, validation, notes)


def load_validation(config: Config, template: PromptTemplate, heldout: dict[str, list[Example]]) -> list[Example]:
    """Raises UserError where a problem is also one that the run is judged by in the end."""
    if config.eval.validation is None:
        return []
    examples = load_examples(config.eval.validation, template, config, split=config.eval.split).examples
    judged = {example.prompt_ids for name in heldout for example in heldout[name]}
    shared = [example.problem.id for example in examples if example.prompt_ids in judged]
    if shared:
        raise UserError(
            f"eval.validation: {len(shared)} of its problems are also among those evaluated in the end (first: "
            f"{shared[0]}), so the best checkpoint would be chosen by what judges it; keep them apart"
        )
    return examples


def check_overlap(config: Config, training: list[Example], judged: dict[str, list[Example]]) -> str:
    """What to say of training problems that the run is also judged by; "" where there are none.

    judged: by the name of their set.

    Raises:
        UserError: there are some, and `eval.overlap` says to refuse.
    """
    from luffy.data_check import plain

    asked, found = {plain(example.problem) for example in training}, []
    for name, examples in judged.items():
        shared = [example.problem.id for example in examples if plain(example.problem) in asked]
        if not shared:
            continue
        found.append(
            f"{len(shared)} of {len(examples)} problems that the run is judged by ({name}; first: {shared[0]}) are "
            f"also trained on"
        )
    said = "; ".join(found)
    if found and config.eval.overlap == "refuse":
        raise UserError(
            f"data: {said}, so accuracy would be that of a memory; leave them out (luffy data check FILE --against "
            f"OTHER names them, luffy data prepare --complement too), or set eval.overlap=warn"
        )
    return said


def resolve(config: ModelConfig) -> str:
    """The folder or Hugging Face id to load the model from."""
    with user_errors("model"):
        return resolve_model(config.name)
