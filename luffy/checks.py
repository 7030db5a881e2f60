"""What is refused before anything slow is loaded: models that packing would corrupt, sequences that do not fit."""

from typing import Any

from luffy.config import Config
from luffy.data import Example
from luffy.errors import UserError
from luffy.model import known_shape
from luffy.objectives import Objective, make_objective
from luffy.sequence import check_heads


def check_model(config: Config, described: Any, examples: list[Example]) -> tuple[Objective, int]:
    """The objective, and the longest sequence that the engine may be asked for, tokens.

    described: transformers' config of the model. examples: of the training data.

    Raises:
        UserError: this model cannot be trained so, or not on these examples.
    """
    check_heads(described, config.mesh.sequence)
    check_body(described)
    objective = make_objective(config.objective)
    objective.prepare(examples)
    return objective, check_lengths(config, objective, examples, described)


def check_body(described: Any) -> None:
    """Raises UserError where a token's hidden state would depend on what else is in its micro-batch."""
    rope = getattr(described, "rope_parameters", None) or getattr(described, "rope_scaling", None) or {}
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    if kind in ("dynamic", "longrope"):
        raise UserError(
            f"model: its positions are rotated by a rule that depends on the longest sequence (rope_type {kind}), "
            f"which packed sequences do not have of their own; choose another model, or rope_type in its config.json"
        )
    other = sorted(set(getattr(described, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if other:
        raise UserError(
            f"model: its {other[0]} layers mix neighbouring tokens outside attention, so packed sequences would leak "
            f"into each other; choose a model of attention layers"
        )


def check_lengths(config: Config, objective: Objective, examples: list[Example], described: Any) -> int:
    """The longest sequence that the engine may be asked for, tokens.

    Raises:
        UserError: a sequence, the longest is named, does not fit the model's positions, its attention window or a
            micro-batch.
    """
    shape = known_shape(described)
    positions, window = getattr(described, "max_position_embeddings", None), None if shape is None else shape.window
    longest_scored = max(map(objective.scored, examples), default=0)  # plus a token that the engine then samples
    longest_answer = max(config.rollout.max_tokens, config.eval.max_tokens or 0)
    asked = config.data.max_prompt_tokens + max(longest_answer, longest_scored + 1)
    if positions is not None and asked > positions:
        raise UserError(
            f"model: it has {positions} positions, and data.max_prompt_tokens + rollout.max_tokens (or "
            f"eval.max_tokens, or a trace that is scored) make {asked}; lower one of them, or raise "
            f"max_position_embeddings in its config.json if its rotations reach further (YaRN)"
        )

    def longest(example: Example) -> int:
        may = objective.may_choose(example)
        traces = [len(example.traces[at]) for at in may]
        # a choice may leave some of them out, and then there is a rollout in place of each
        answer = [config.rollout.max_tokens] if objective.rollouts(min(len(may), objective.options.shown)) else []
        return len(example.prompt_ids) + max([0, *answer, *traces])

    worst = max(examples, key=longest)
    what = f"problem {worst.problem.id}: its prompt of {len(worst.prompt_ids)} tokens and its longest answer or trace"
    lower = "lower rollout.max_tokens, data.max_trace_tokens or data.max_prompt_tokens"
    if positions is not None and longest(worst) > positions:
        raise UserError(f"{what} make {longest(worst)} tokens, and the model has {positions} positions; {lower}")
    if window is not None and longest(worst) - 1 > window:
        raise UserError(
            f"{what} make {longest(worst)} tokens, and the model's attention window of {window}, shorter than that, is "
            f"not supported; {lower}"
        )
    budget = config.train.tokens_per_micro
    if longest(worst) - 1 > budget:  # the last token of an answer predicts nothing and stays out
        raise UserError(
            f"{what} make {longest(worst)} tokens, more than train.tokens_per_micro {budget}; raise it to "
            f"{longest(worst) - 1} (mesh.sequence spreads a micro-batch over ranks), or {lower}"
        )
    return asked
