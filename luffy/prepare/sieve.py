"""The sieve that options ask for: tokenizer, verifier processes, questions to leave out."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from luffy.data.load import load_problems
from luffy.embedded import resolve_model
from luffy.errors import UserError, first_line, user_errors
from luffy.prepare.options import Options
from luffy.prepare.sift import Sieve, question_key
from luffy.rewards import VerifierPool
from luffy.rewards.golds import Answer

BATCH = 64


def make_sieve(options: Options, stack: ExitStack) -> Sieve:
    """Processes that it starts end with `stack`."""
    sieve = Sieve(options=options, tokens=Tokens(options.tokenizer).count)
    if options.complement is not None:
        problems = load_problems(options.complement)
        sieve.left_out = frozenset(question_key(problem.messages) for problem in problems)
    if options.verify is not None:
        with user_errors("prepare"):
            pool = stack.enter_context(VerifierPool(options.verify))

        def accepts(pairs: Sequence[tuple[str, Answer]]) -> list[bool]:
            return [verdict.reward >= 1 for verdict in pool.grade(pairs)]

        sieve.accepts = accepts
    return sieve


class Tokens:
    """Counts of texts' tokens without special ones. The tokenizer is loaded when there is a text to count."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tokenizer: Any = None

    def count(self, texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        if self._tokenizer is None:
            self._tokenizer = _load(self._name)
        counts: list[int] = []
        for at in range(0, len(texts), BATCH):  # the ids of a whole part would fill the memory
            found = self._tokenizer(list(texts[at : at + BATCH]), add_special_tokens=False, verbose=False)
            counts += [len(ids) for ids in found["input_ids"]]
        return counts


def _load(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        # a tokenizer may lie in a folder without a model, which resolve_model refuses
        return AutoTokenizer.from_pretrained(resolve_model(name) if name.startswith("embedded:") else name)
    except (ValueError, OSError) as error:
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"prepare: the tokenizer {name} that counts tokens could not be loaded ({reason}); name another with "
            "--tokenizer, a folder or embedded:smollm2-135m-instruct"
        ) from error
