"""What is refused before anything slow is loaded. Through the command, on many ranks: test_bad_input_walk.py."""

import json

import pytest
from tiny import make_tokenizer
from transformers import Lfm2Config, LlamaConfig, MistralConfig

from luffy.checks import check_body, check_lengths
from luffy.config import Config, config_of
from luffy.data import Example
from luffy.data.problem import Problem
from luffy.errors import UserError
from luffy.objectives import make_objective
from luffy.prompts import PromptTemplate
from luffy.sources import check_overlap, load_examples, load_validation


def example(name: str, prompt: int, *traces: int) -> Example:
    problem = Problem(
        id=name, data_source="s", messages=({"role": "user", "content": "?"},), answer="1", traces=(), extra={}
    )
    return Example(problem, tuple(range(prompt)), tuple(tuple(range(n)) for n in traces))


def check(config: Config, examples: list[Example], positions: int = 2**20) -> int:
    described = LlamaConfig(max_position_embeddings=positions)
    return check_lengths(config, make_objective(config.objective), examples, described)


def lengths(objective: str = "luffy", **changes) -> Config:
    config = config_of(objective)()
    config.data.max_prompt_tokens, config.rollout.max_tokens, config.train.tokens_per_micro = 30, 20, 100
    for key, value in changes.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    return config


def test_a_sequence_longer_than_positions_or_budget_is_named():
    examples = [example("short", 5, 10), example("long", 20, 70)]
    assert check(lengths(), examples, 90) == 50
    assert check(lengths(eval__max_tokens=40), examples) == 70
    with pytest.raises(
        UserError, match=r"problem long: its prompt of 20 tokens .* make 90 tokens, .* has 89 positions"
    ):
        check(lengths(), examples, 89)
    with pytest.raises(UserError, match=r"problem long: .* more than train.tokens_per_micro 88; raise it to 89"):
        check(lengths(train__tokens_per_micro=88), examples)
    check(lengths(train__tokens_per_micro=89), examples)  # the last token stays out
    with pytest.raises(UserError, match=r"40 positions, and data.max_prompt_tokens \+ rollout.max_tokens .* make 50"):
        check(lengths(), examples[:1], 40)


def test_only_what_the_objective_uses_counts():
    unused = [example("p", 5, 3, 90)]  # a second trace
    check(lengths(train__tokens_per_micro=24), unused)
    with pytest.raises(UserError, match="make 25 tokens, more than train.tokens_per_micro 23"):
        check(lengths(train__tokens_per_micro=23), unused)
    check(lengths(train__tokens_per_micro=23, objective="sft"), unused)  # which samples nothing
    check(lengths(train__tokens_per_micro=24, objective="grpo"), [example("p", 5, 90)])


def test_models_that_packing_would_corrupt_are_refused():
    check_body(LlamaConfig())
    with pytest.raises(UserError, match="rope_type dynamic"):
        check_body(LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))
    with pytest.raises(UserError, match="its conv layers mix neighbouring tokens"):
        check_body(Lfm2Config(layer_types=["conv", "full_attention"], num_hidden_layers=2))
    window = MistralConfig(sliding_window=20)
    config = lengths()
    with pytest.raises(UserError, match="make 25 tokens, and the model's attention window of 20"):
        check_lengths(config, make_objective(config.objective), [example("p", 5)], window)


def test_a_validation_set_may_not_hold_what_the_run_is_judged_by(tmp_path):
    def rows(*questions: str):
        path = tmp_path / f"{questions[0]}.jsonl"
        path.write_text("".join(json.dumps({"question": q, "answer": "#### 1"}) + "\n" for q in questions))
        return path

    template, config = PromptTemplate(make_tokenizer()), Config()
    assert load_validation(config, template, {}) == []
    config.eval.validation = str(rows("one", "two"))
    examples = load_validation(config, template, {"heldout": []})
    assert len(examples) == 2
    with pytest.raises(
        UserError, match=r"eval.validation: 1 of its problems are also among those evaluated in the end"
    ):
        load_validation(config, template, {"heldout": examples[1:]})


def test_what_a_run_is_judged_by_is_not_trained_on(tmp_path):
    """Also where it is written a little differently."""

    def asked(*questions: str):
        path = tmp_path / "questions.jsonl"
        path.write_text("".join(json.dumps({"question": q, "answer": "#### 1"}) + "\n" for q in questions))
        return load_examples(path, PromptTemplate(make_tokenizer()), config).examples

    config = Config()
    training = asked("What is 7+3?", "Name a prime.", "Another?")
    assert check_overlap(config, training, {"heldout": asked("What is 7-3?"), "ood": asked("name two primes")}) == ""
    judged = {"ood": asked("Something else"), "heldout": asked("x", "what  is 7+3 ?", "Name a prime")}
    with pytest.raises(UserError, match=r"2 of 3 problems .*\(heldout; first: questions/1\).*eval.overlap=warn"):
        check_overlap(config, training, judged)
    config.eval.overlap = "warn"
    assert "2 of 3 problems" in check_overlap(config, training, judged)
