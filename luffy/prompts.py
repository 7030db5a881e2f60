"""From messages and traces to token ids: the one place where text becomes ids.

Styles of prompt:
    chat     the tokenizer's chat template (or one given here) with the generation prompt
    luffy    LUFFY's published plain-text template, which ends in the opening think tag
    plain    the messages' texts, one a line: for base models with no template

A trace always ends in the id that generation stops on. Prompt and trace are encoded apart and joined as ids, as a
rollout is; nothing is decoded and encoded again. Deliberately absent: padding, truncation, labels.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
Style = Literal["chat", "luffy", "plain"]

THINK_START = "<think>\n"

# LUFFY's system text as its data files store it, stray newline-comma included.
LUFFY_SYSTEM = (
    "Your task is to follow a systematic, thorough reasoning process before providing the final solution. This "
    "involves analyzing, summarizing, exploring, reassessing, and refining your thought process through "
    "multiple iterations. Structure your response into two sections: Thought and Solution. In the Thought "
    'section, present your reasoning using the format: "<think>\n {thoughts} </think>\n". Each thought should '
    'include detailed analysis, brainstorming, verification, and refinement of ideas. After "</think>\n," in '
    "the Solution section, provide the final, logical, and accurate answer, clearly derived from the "
    "exploration in the Thought section. If applicable, include the answer in \\boxed{} for closed-form "
    "results like multiple choices or mathematical solutions."
)

# A ChatML template that adds no system turn of its own: SmolLM2's and Qwen2.5's templates add one to every prompt.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class PromptTemplate:
    """How one tokenizer's prompts and traces are written.

    Args:
        tokenizer: of transformers.
        style: see the module.
        system: None keeps the messages' system turns, "" removes them, a text replaces them; with `luffy`, whose system
            text is fixed, it must be None.
        chat_template: a Jinja text used instead of the tokenizer's own (say, `CHATML`); `chat` only.
        eos_token: the token that ends a trace and must stop generation; the tokenizer's own by default.
        vocab_size: ids that the model has an embedding for; None: not known. Kept for who encodes data, not checked.

    Raises:
        ValueError: the tokenizer has no chat template or no EOS, or the template closes a turn with another token than
            the EOS: the model would learn to end turns in a way that generation does not stop on.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        style: Style = "chat",
        system: str | None = None,
        chat_template: str | None = None,
        eos_token: str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if style not in get_args(Style):
            raise ValueError(f"PromptTemplate: style must be among {', '.join(get_args(Style))}, got {style!r}")
        if style == "luffy" and system is not None:
            raise ValueError("PromptTemplate: system must be None with style 'luffy', whose system text is fixed")
        if chat_template is not None and style != "chat":
            raise ValueError(f"PromptTemplate: chat_template is for style 'chat', got style {style!r}")
        if style == "chat" and not (chat_template or tokenizer.chat_template):
            raise ValueError(
                f"PromptTemplate: tokenizer {tokenizer.name_or_path!r} has no chat template; "
                "give one as chat_template, or use style 'luffy' or 'plain' (--template of a command)"
            )
        self.tokenizer, self.style, self.system, self.chat_template = tokenizer, style, system, chat_template
        self.vocab_size = vocab_size
        self.doubt = ""
        """What speaks against this form of prompts for this model (`luffy.markers`), if whoever loads it has looked."""
        self.eos_token_id = self._find_eos(eos_token)
        self.eos_text = str(tokenizer.convert_ids_to_tokens(self.eos_token_id))
        # Whether the prompt itself opens the think block, so that a trace must not open it again.
        self.opens_think = self.render([{"role": "user", "content": "?"}]).endswith(THINK_START)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt's text.

        Raises:
            ValueError: the last message is not the user's, or the style takes one message alone.
        """
        if not messages or messages[-1]["role"] != "user":
            raise ValueError(f"PromptTemplate: the last message must be the user's, got {list(messages)!r:.200}")
        turns = [dict(message) for message in messages]
        if self.system is not None or self.style == "luffy":
            turns = [turn for turn in turns if turn["role"] != "system"]
        if self.system:
            turns.insert(0, {"role": "system", "content": self.system})
        if self.style == "plain":
            return "".join(turn["content"] + "\n" for turn in turns)
        if self.style == "luffy":
            if len(turns) != 1:
                raise ValueError(f"PromptTemplate: style 'luffy' takes one user message, got {len(turns)} messages")
            return f"{LUFFY_SYSTEM}\nUser: This is the problem:\n{turns[0]['content']}\nAssistant: {THINK_START}"
        return self._chat(turns, add_generation_prompt=True)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the prompt. A chat template writes its own special tokens; other styles get the tokenizer's BOS."""
        ids = list(self.tokenizer.encode(self.render(messages), add_special_tokens=self.style != "chat"))
        # Tokenizers that close every text with an EOS would end the sequence before the response.
        return ids[:-1] if self.style != "chat" and ids[-1:] == [self.eos_token_id] else ids

    def encode_trace(self, text: str) -> list[int]:
        """Ids of a trace, ending in exactly one EOS; an opening think tag the prompt already has is left out.

        Raises:
            ValueError: the EOS also occurs inside; whatever follows it could never be generated.
        """
        if self.opens_think:
            text = text.removeprefix(THINK_START)
        ids = list(self.tokenizer.encode(text.removesuffix(self.eos_text), add_special_tokens=False))
        if self.eos_token_id in ids:
            raise ValueError(f"PromptTemplate: the trace has the EOS token {self.eos_text!r} inside")
        return [*ids, self.eos_token_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of response ids up to the first EOS."""
        ids = list(ids)
        end = ids.index(self.eos_token_id) if self.eos_token_id in ids else len(ids)
        # Other special tokens stay: in some vocabularies the think tags are among them, and a grader looks for those.
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def _chat(self, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            turns, chat_template=self.chat_template, add_generation_prompt=add_generation_prompt, tokenize=False
        )
        return str(text)

    def _find_eos(self, eos_token: str | None) -> int:
        tokenizer = self.tokenizer
        if eos_token is not None:
            found = tokenizer.get_vocab().get(eos_token)
            if found is None:
                raise ValueError(f"PromptTemplate: eos_token {eos_token!r} is not a token of the tokenizer")
            return int(found)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"PromptTemplate: tokenizer {tokenizer.name_or_path!r} has no EOS; give eos_token")
        closing = self._turn_end() if self.style == "chat" else None
        if closing is not None and closing != tokenizer.eos_token_id:
            written = tokenizer.convert_ids_to_tokens(closing)
            raise ValueError(
                f"PromptTemplate: the chat template closes a turn with {written!r} but the tokenizer's EOS is "
                f"{tokenizer.eos_token!r}; give eos_token={written!r} (and stop generation on it)"
            )
        return int(tokenizer.eos_token_id)

    def _turn_end(self) -> int | None:
        """Id of the special token that the chat template writes right after an assistant's text, if any."""
        marker = "luffy-marker"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
        _, _, after = self._chat(turns, add_generation_prompt=False).rpartition(marker)
        ids = self.tokenizer.encode(after.strip(), add_special_tokens=False)
        return ids[0] if ids and ids[0] in self.tokenizer.all_special_ids else None
