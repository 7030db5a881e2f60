"""Configuration: recipes parse, overrides win, mistakes are named."""

import types
import typing

import pytest
import tomli_w

from luffy.config import Config, config_of, flat_keys
from luffy.config_file import load_config, recipe_names
from luffy.errors import UserError
from luffy.objectives import KNOWN
from luffy.objectives.grpo import RatioOptions


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses_and_survives_being_written_back(name, tmp_path):
    config = load_config(name)
    assert config.name == name
    again = tmp_path / "config.toml"
    again.write_text(tomli_w.dumps(config.model_dump(exclude_none=True, mode="json")))
    assert load_config(str(again)) == config


def test_the_paper_recipe_states_the_published_values():
    config = load_config("luffy-qwen2.5-math-7b")
    assert (config.objective.rows, config.objective.gamma, config.objective.advantage_std) == (8, 0.1, False)
    assert (config.objective.clip_low, config.objective.clip_high) == (None, None)
    assert (config.objective.normalizer, config.objective.entropy_coef) == (65536.0, 0.001)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.schedule) == (1e-6, 0.01, "constant")
    assert (config.train.prompts_per_step, config.train.updates_per_step, config.train.steps) == (128, 2, 500)
    assert (config.data.max_prompt_tokens, config.data.max_trace_tokens, config.rollout.max_tokens) == (
        1024,
        8192,
        8192,
    )
    assert (config.rollout.temperature, config.eval.temperature, config.reward.grader) == (1.0, 0.6, "train")


def test_quickstart_differs_from_the_paper_recipe_only_in_values():
    assert load_config("quickstart").objective.name == load_config("luffy-qwen2.5-math-7b").objective.name == "luffy"


def test_overrides_win_over_the_recipe():
    config = load_config("quickstart", ["--optim.lr", "3e-4", "--objective.clip_low=0.2", "--optim.betas", "[0.8,0.9]"])
    assert (config.optim.lr, config.objective.clip_low, config.optim.betas) == (3e-4, 0.2, (0.8, 0.9))


def test_naming_families_replaces_those_of_the_recipe():
    config = load_config("quickstart", ["--data.problems.families", '{"product": {"digits": [2, 3]}}'])
    assert config.data.problems.families == {"product": {"digits": [2, 3]}}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--optim.lrr", "1"], ["--optim.lrr", "did you mean --optim.lr?"]),
        (["--rollout.temprature", "1"], ["--rollout.temperature"]),
        (["--optim.lr", "fast"], ["optim.lr", "'fast'"]),
        (["--optim.lr", "-1"], ["optim.lr", "greater than 0"]),
        (["--optim.lr"], ["--optim.lr", "expected one argument"]),
        (["stray"], ["stray"]),
        (["--objective.name", "gpro"], ["objective.name", "'gpro'"]),
        (["--train.updates_per_step", "3"], ["train.prompts_per_step", "train.updates_per_step"]),
    ],
)
def test_a_bad_override_is_one_sentence_that_names_it(overrides, words):
    with pytest.raises(UserError) as error:
        load_config("quickstart", overrides)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[optim]\nlearning_rate = 1.0\n", ["optim.learning_rate"]),
        ("[optimizer]\nlr = 1.0\n", ["'optimizer'", "did you mean optim?"]),
        ("optim = 3\n", ["optim", "table"]),
        ("[optim\n", ["not valid TOML"]),
    ],
)
def test_a_bad_file_is_one_sentence(text, words, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(str(file))
    for word in words:
        assert word in str(error.value)


def test_a_file_that_is_not_utf_8_is_one_sentence(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_bytes('name = "gr\xfc\xdfe"\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"mine\.toml is not valid TOML, which is UTF-8.*position 10"):
        load_config(str(file))


def test_a_misspelt_recipe_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean quickstart"):
        load_config("quickstrt")
    with pytest.raises(UserError, match="no file"):
        load_config("nowhere.toml")


def test_every_key_says_what_it_is():
    for name in KNOWN:
        assert not [key for key, field in flat_keys(config_of(name)).items() if not field.description], name
    ratio = flat_keys(config_of("dapo"))["objective.clip_low"]
    assert (ratio.default, ratio.description) == (0.2, RatioOptions.model_fields["clip_low"].description)


def test_optional_keys_default_to_null_so_that_toml_can_say_everything():
    for key, field in flat_keys().items():
        optional = typing.get_origin(field.annotation) in (types.UnionType, typing.Union) and type(
            None
        ) in typing.get_args(field.annotation)
        if optional:
            assert field.default is None, key


def test_the_environment_does_not_configure_a_run(monkeypatch):
    monkeypatch.setenv("NAME", "other")
    monkeypatch.setenv("TRAIN", '{"steps": 3}')
    assert Config().name == "run"
    assert Config().train.steps == 500
