"""Whether prompts mark turns as the model was trained to: what to look at first when nothing is learned.

A model trained on dialogues marks turns with tokens of their own, and its chat template ends an answer with a token
that generation stops on. Base models often carry a chat template too, whose tokens they were never trained on: it ends
an answer with another token than theirs. Nothing is said about those, and any prompt may be written for them.
"""

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luffy.prompts import PromptTemplate

QUESTION = {"role": "user", "content": "?"}
ANSWER = "luffy-marker"
MARKER = re.compile(r"<\|[^|<>\s]+\|>")


def doubt(template: "PromptTemplate", own: str | None, ends: Collection[int]) -> str:
    """What speaks against the prompts that `template` writes, "" where nothing does.

    Args:
        own: the chat template that came with the model; None: there is none.
        ends: ids that end an answer, as the model's files say.
    """
    said = []
    if unknown := _unknown(template):
        said.append(f"the chat template writes {', '.join(unknown)}, and the tokenizer has no such tokens")
    if own is not None and (unused := _unused(template, own, ends)):
        said.append(f"prompts have none of {', '.join(unused)}, with which the model's own chat template marks turns")
    return "; ".join(said)


def _unknown(template: "PromptTemplate") -> list[str]:
    """Markers that a chat template from elsewhere writes and the tokenizer spells out, letter by letter."""
    if template.chat_template is None:
        return []
    written, known = _written(template.tokenizer, template.chat_template, [QUESTION]), template.tokenizer.get_vocab()
    return [mark for mark in dict.fromkeys(MARKER.findall(written)) if mark not in known]


def _unused(template: "PromptTemplate", own: str, ends: Collection[int]) -> list[str]:
    """Special tokens inside the prompts of the model's own template, if the run's have none of them."""
    from jinja2 import TemplateError

    tokenizer = template.tokenizer
    try:
        asked = _written(tokenizer, own, [QUESTION])
        after = _written(tokenizer, own, [QUESTION, {"role": "assistant", "content": ANSWER}]).rpartition(ANSWER)[2]
    except TemplateError:  # it takes other turns than these, which the run need not care about
        return []
    if not set(tokenizer.encode(after.strip(), add_special_tokens=False)[:1]) & set(ends):
        return []
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = special.intersection(
        tokenizer.encode(asked, add_special_tokens=False)[1:]
    )  # the first may be a BOS, no marker
    if marks.intersection(template.encode_prompt([QUESTION])[1:]):
        return []
    return list(tokenizer.convert_ids_to_tokens(sorted(marks)))


def _written(tokenizer: "PreTrainedTokenizerBase", chat_template: str, turns: list[dict[str, str]]) -> str:
    asks = turns[-1]["role"] == "user"
    return str(
        tokenizer.apply_chat_template(turns, chat_template=chat_template, add_generation_prompt=asks, tokenize=False)
    )
