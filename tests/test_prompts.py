"""Prompt templates: what is written, what ends a trace, what is refused."""

import hashlib

import pytest

from luffy.prompts import CHATML, LUFFY_SYSTEM, PromptTemplate

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

USER = [{"role": "user", "content": "What is 6*7?"}]
THINKING = CHATML.replace("assistant\n'", "assistant\n<think>\n'")


def make_tokenizer(chat_template=CHATML, eos="<|im_end|>"):
    """A byte-level tokenizer with ChatML's special tokens, made here: no download."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "</think>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.eos_token = eos
    tokenizer.chat_template = chat_template
    return tokenizer


def test_system_text_is_the_published_one():
    assert len(LUFFY_SYSTEM) == 762
    digest = hashlib.sha256(LUFFY_SYSTEM.encode()).hexdigest()
    assert digest == "a8747f1674d341836ab8fae3c29263fee4dd555f07259cdbc6dadf4104ea8926"


def test_luffy_style_is_plain_text_that_opens_the_think_block():
    template = PromptTemplate(make_tokenizer(), style="luffy")
    rendered = template.render([{"role": "system", "content": "ignored"}, *USER])
    assert rendered == f"{LUFFY_SYSTEM}\nUser: This is the problem:\nWhat is 6*7?\nAssistant: <think>\n"
    assert template.decode(template.encode_prompt(USER)) == rendered


@pytest.mark.parametrize("style", ["luffy", "chat"])
def test_the_think_tag_is_never_written_twice(style):
    template = PromptTemplate(make_tokenizer(THINKING), style=style)
    assert template.opens_think
    ids = template.encode_prompt(USER) + template.encode_trace("<think>\n6*7=42\n</think>\n42")
    whole = template.tokenizer.decode(ids)
    assert whole.count("<think>\n6*7") == 1
    assert "<think>\n<think>" not in whole


def test_the_think_tag_stays_when_the_prompt_does_not_open_it():
    template = PromptTemplate(make_tokenizer(), style="chat")
    assert template.decode(template.encode_trace("<think>\na</think>b")) == "<think>\na</think>b"


def test_chat_style_is_the_tokenizers_own_template():
    template = PromptTemplate(make_tokenizer())
    ids = template.encode_prompt(USER)
    expected = "<|im_start|>user\nWhat is 6*7?<|im_end|>\n<|im_start|>assistant\n"
    assert template.tokenizer.decode(ids) == expected
    assert ids.count(template.eos_token_id) == 1, "special tokens are ids of their own, not spelt out"


def test_a_custom_chat_template_is_used():
    template = PromptTemplate(make_tokenizer(None), chat_template="{{ messages[0]['content'] }} =")
    assert template.render(USER) == "What is 6*7? ="


@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_system_keeps_removes_or_replaces(system):
    template = PromptTemplate(make_tokenizer(), style="plain", system=system)
    said = template.render([{"role": "system", "content": "Think."}, *USER])
    assert said == {None: "Think.\n", "": "", "Be brief.": "Be brief.\n"}[system] + "What is 6*7?\n"


def test_a_trace_ends_in_exactly_one_eos():
    template = PromptTemplate(make_tokenizer())
    plain = template.encode_trace("42")
    assert plain[-1] == template.eos_token_id == template.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert template.encode_trace("42<|im_end|>") == plain
    assert plain.count(template.eos_token_id) == 1
    with pytest.raises(ValueError, match="inside"):
        template.encode_trace("4<|im_end|>2")


def test_decode_stops_at_the_eos_and_keeps_think_tags():
    template = PromptTemplate(make_tokenizer())
    ids = template.encode_trace("a</think>b")
    assert template.decode([*ids, *ids]) == "a</think>b"
    assert template.decode([]) == ""


def test_a_turn_that_closes_with_another_token_than_the_eos_is_refused():
    tokenizer = make_tokenizer(eos="<|endoftext|>")
    with pytest.raises(ValueError, match=r"closes a turn with '<\|im_end\|>' but the tokenizer's EOS"):
        PromptTemplate(tokenizer)
    template = PromptTemplate(tokenizer, eos_token="<|im_end|>")
    assert template.encode_trace("42")[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has no chat template; give one"),
        ({"style": "alpaca"}, "style must be among"),
        ({"style": "luffy", "system": "x"}, "system must be None"),
        ({"style": "plain", "chat_template": "x"}, "chat_template is for style 'chat'"),
        ({"style": "plain", "eos_token": "<eos>"}, "not a token"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PromptTemplate(make_tokenizer(chat_template=None), **options)


def test_the_last_message_must_be_the_users():
    template = PromptTemplate(make_tokenizer())
    for messages in ([], [*USER, {"role": "assistant", "content": "42"}]):
        with pytest.raises(ValueError, match="last message must be the user's"):
            template.render(messages)
