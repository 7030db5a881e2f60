"""Prompts that lack the tokens with which a model's dialogues are written, told from prompts that are merely others."""

import json

import pytest
from tiny import make_tokenizer

from luffy.config import ModelConfig
from luffy.prompts import CHATML
from luffy.sources import load_template

UNUSED = "prompts have none of <|im_start|>, <|im_end|>, with which the model's own chat template marks turns"
FOREIGN = CHATML.replace("<|im_start|>", "<|start_header_id|>").replace("<|im_end|>", "<|eot_id|>")
OF_TEXT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def doubt(folder, own=CHATML, eos="<|im_end|>", ends=None, **options) -> str:
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token, tokenizer.bos_token = own, eos, "<|im_start|>"
    tokenizer.save_pretrained(folder)
    if ends is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return load_template(str(folder), ModelConfig(name=str(folder), **options)).doubt


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chat_template": CHATML.replace("assistant\n'", "assistant\n<think>\n'")},
        {"chat_template": CHATML, "own": None},
        {"prompt_style": "luffy", "eos": "<|endoftext|>"},  # a base model, as in LUFFY's recipe
        {"prompt_style": "plain", "eos": "<|endoftext|>", "ends": 0},
        {"prompt_style": "luffy", "own": OF_TEXT},  # no tokens of its own but the BOS
        {"prompt_style": "plain", "own": None},
        {"prompt_style": "plain", "own": "{{ raise_exception('the first turn must be of the system') }}"},
        {"chat_template": OF_TEXT, "own": None},
        {"chat_template": CHATML, "system": "Never write <|endofprompt|>."},  # said, not used
    ],
)
def test_prompts_that_may_be_meant(options, tmp_path):
    assert doubt(tmp_path, **options) == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt_style": "plain"}, UNUSED),
        ({"prompt_style": "luffy"}, UNUSED),
        ({"prompt_style": "plain", "chat_template": CHATML}, UNUSED),  # a template that this style does not use
        ({"chat_template": OF_TEXT.replace("{{ bos_token }}", "")}, UNUSED),
        ({"prompt_style": "plain", "eos": "<|endoftext|>", "ends": [0, 2]}, UNUSED),  # dialogues end with another token
        (
            {"chat_template": FOREIGN},
            f"the chat template writes <|start_header_id|>, <|eot_id|>, and the tokenizer has no such tokens; {UNUSED}",
        ),
        (
            {"chat_template": FOREIGN, "own": None},
            "the chat template writes <|start_header_id|>, <|eot_id|>, and the tokenizer has no such tokens",
        ),
    ],
)
def test_prompts_that_this_model_was_not_trained_on(options, said, tmp_path):
    assert doubt(tmp_path, **options) == said
