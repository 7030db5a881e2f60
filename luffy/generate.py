"""Ask a model from Python; `luffy generate` does so too.

from luffy.generate import Model

with Model("runs/quickstart") as model:
    print(model.answer("What is 4+9+2+7?"))
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from luffy.errors import UserError
from luffy.opening import ANSWER_TOKENS, Opened, open_model, start_engine

Asked = str | Sequence[Mapping[str, str]]
"""A question, or the turns of a conversation that ends with the user's."""


class Model:
    """A model with its engine, until it is closed.

    model: run folder, model folder or Hugging Face id, or one that is opened already. context: tokens of the longest
    prompt and answer together. options: of `luffy.opening.open_model`.

    Raises:
        UserError: there is no such model, or it does not start.
    """

    def __init__(self, model: str | Opened, *, context: int = 4096, **options: Any) -> None:
        from luffy.process import prepare_libraries

        prepare_libraries()
        self.opened = open_model(model, **options) if isinstance(model, str) else model
        self.context = context
        self.engine = start_engine(self.opened, context)

    def answer(self, asked: Asked, **sampling: Any) -> str:
        """One answer. sampling: of `answers`."""
        [[text]] = self.answers([asked], **sampling)
        return text

    def answers(
        self,
        asked: Sequence[Asked],
        *,
        n: int = 1,
        temperature: float = 0.6,
        top_p: float = 1.0,
        max_tokens: int = ANSWER_TOKENS,
        seed: int = 0,
    ) -> list[list[str]]:
        """n answers to each, without what ends them; greedy at temperature 0.

        Raises:
            UserError: a prompt and `max_tokens` are more than `context`.
        """
        from luffy.rollout.engine import Request, generate
        from luffy.seeds import derive

        if n < 1 or max_tokens < 1 or (n > 1 and not temperature):
            raise UserError("generate: n and max_tokens must be positive, and n is 1 at temperature 0, which is greedy")
        prompts = [self.prompt(one, max_tokens) for one in asked]
        requests = [Request(ids, n, max_tokens, derive(seed, "ask", at), top_p) for at, ids in enumerate(prompts)]
        found = generate(self.engine, requests, temperature)
        return [[self.opened.template.decode(one.token_ids) for one in completions] for completions in found]

    def stream(
        self,
        asked: Asked,
        *,
        temperature: float = 0.6,
        top_p: float = 1.0,
        max_tokens: int = ANSWER_TOKENS,
        seed: int = 0,
    ) -> Iterator[str]:
        """An answer in pieces, as they are sampled; together they are what `answer` gives."""
        from luffy.rollout.engine import Request
        from luffy.seeds import derive

        request = Request(self.prompt(asked, max_tokens), 1, max_tokens, derive(seed, "ask", 0), top_p)
        said = text = ""
        for ids in self.engine.stream(request, temperature):
            text = self.opened.template.decode(ids)
            whole = text.rstrip("\ufffd")  # a character may be of several tokens
            if len(whole) > len(said) and whole.startswith(said):
                yield whole[len(said) :]
                said = whole
        if len(text) > len(said):
            yield text[len(said) :]

    def prompt(self, asked: Asked, max_tokens: int) -> tuple[int, ...]:
        """Ids of the prompt that asks this.

        Raises:
            UserError: with an answer of `max_tokens` it is longer than `context`.
        """
        turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        ids = tuple(self.opened.template.encode_prompt(turns))
        if len(ids) + max_tokens > self.context:
            raise UserError(
                f"generate: a prompt of {len(ids)} tokens and an answer of up to {max_tokens} are more than the "
                f"context of {self.context}; lower max_tokens or raise context"
            )
        return ids

    def close(self) -> None:
        """Give back the engine's memory and processes; nothing can be asked afterwards."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
