"""A teacher that is asked how probable stored traces are, and whether it can be.

A trace's tokens are the student's, so teacher and student must read prompts and traces as the same ids. The one
exception is the EOS: an answer ends where its author ends it, so in its place the teacher is asked for its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from luffy.data import Problem
from luffy.errors import UserError

if TYPE_CHECKING:
    from luffy.prompts import PromptTemplate, Style

Ids = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Who is asked, and how.

    name: what the file calls it. identity: what tells its weights from others. student, template: how prompts and
    traces are written for the two. own_prompt: the teacher sees prompts as its own template writes them, not as the
    student's does. max_tokens: longest prompt and trace together that it is asked about.
    """

    name: str
    identity: str
    student: PromptTemplate
    template: PromptTemplate
    own_prompt: bool = False
    max_tokens: int = 16384

    def sequence(self, problem: Problem, text: str) -> tuple[Ids, Ids]:
        """(prompt, trace) as the teacher is asked for them.

        Raises:
            UserError: it reads them as other ids than the student.
            ValueError: the trace has an EOS inside.
        """
        trace = self.student.encode_trace(text)
        its_trace = self.template.encode_trace(text.removesuffix(self.student.eos_text))
        self._agree(trace[:-1], its_trace[:-1], f"a trace of {problem.id}")
        its_prompt = self.template.encode_prompt(problem.messages)
        if not self.own_prompt:
            self._agree(self.student.encode_prompt(problem.messages), its_prompt, f"the prompt of {problem.id}")
        return tuple(its_prompt), tuple(its_trace)

    def _agree(self, mine: Sequence[int], its: Sequence[int], what: str) -> None:
        for at, (a, b) in enumerate(zip_longest(mine, its)):
            if a != b:
                raise UserError(
                    f"score: student and teacher read {what} as different tokens, first at token {at + 1}: "
                    f"{named(self.student, a)} and {named(self.template, b)}; only a teacher with the student's "
                    f"tokenizer can say how probable the student's tokens are"
                )

    def settings(self) -> dict[str, Any]:
        """What a score depends on, apart from the file."""
        prompts = self.template if self.own_prompt else self.student
        seen = self.sequence(_PROBE, "1 + 1 = 2")
        return {
            "teacher": self.name,
            "weights": self.identity,
            "eos": [self.student.eos_token_id, self.template.eos_token_id],
            "prompt": prompts.render(_PROBE.messages),
            "ids": seen,
            "max_tokens": self.max_tokens,
        }


_PROBE = Problem(id="probe", data_source="", messages=({"role": "user", "content": "1 + 1?"},), answer="2")


def named(template: PromptTemplate, token: int | None) -> str:
    """An id and its text, for a message; None: there is no token."""
    return "the end" if token is None else f"{token} {template.tokenizer.convert_ids_to_tokens(token)!r}"


def template_of(path: str, student: PromptTemplate, own: Style | None) -> PromptTemplate:
    """The teacher's: the student's prompts by the teacher's tokenizer, or those of its own template of style `own`.

    Raises:
        UserError: only one of the two prompts opens the think block, so that traces begin at different places.
    """
    from transformers import AutoTokenizer

    from luffy.prompts import PromptTemplate

    tokenizer = AutoTokenizer.from_pretrained(path)
    # its own EOS, whichever token its chat template closes a turn with
    options: dict[str, Any] = {"system": student.system, "eos_token": tokenizer.eos_token}
    if own is not None:
        found = PromptTemplate(tokenizer, style=own, **options)
    else:
        written = (student.chat_template or student.tokenizer.chat_template) if student.style == "chat" else None
        found = PromptTemplate(tokenizer, style=student.style, chat_template=written, **options)
    if found.opens_think != student.opens_think:
        raise UserError(
            "score: one of the teacher's and the student's prompts opens the think block and the other does not, so a "
            "trace would begin at different places; give a --teacher-template that does as the student's"
        )
    return found
