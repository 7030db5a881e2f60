"""What a problem is, and how a row of LUFFY's or GSM8K's schema becomes one.

LUFFY's columns: data_source, prompt (list of {content, role}), target (list of one {content, role}, or null or
absent), target_lst (optional list of further traces), ability, reward_model {ground_truth, style}, extra_info
{index, split, ...}. GSM8K's: question, answer with a last line `#### gold` and calculator marks `<<1+1=2>>`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

SCHEMA = "prompt and reward_model (optional: target, target_lst, data_source, ability, extra_info)"
OPTIONAL = ("target", "target_lst", "target_ds_qwen_7b_probs", "data_source", "ability", "extra_info")
GSM8K_COLUMNS = frozenset({"question", "answer"})

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_GOLD = re.compile(r"\n?####[ \t]*(\S[^\n]*?)\s*\Z")


class DataError(ValueError):
    """The data cannot be used; the message is one sentence that says what is wrong and where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question with a verifiable answer and any number of worked solutions.

    id: stable and unique within its source. messages: role/content turns, the last one the user's.
    answer: the accepted answer, or a tuple of accepted ones. traces: texts, as the teacher wrote them.
    extra: everything else the row said, for reports.
    """

    id: str
    data_source: str
    messages: tuple[Mapping[str, str], ...]
    answer: str | tuple[str, ...]
    traces: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def check_columns(columns: Iterable[str], where: str) -> bool:
    """True for GSM8K's columns, False for LUFFY's; DataError that names the missing column and the nearest present."""
    present = list(columns)
    if set(present) >= GSM8K_COLUMNS:
        return True
    for column in ("prompt", "reward_model"):
        if column not in present:
            near = difflib.get_close_matches(column, present, n=1, cutoff=0.0)
            nearest = f"the nearest column present is {near[0]!r}" if near else "there are no columns"
            raise DataError(f"{where}: column {column!r} is missing, {nearest}; expected {SCHEMA}")
    for column in (column for column in OPTIONAL if column not in present):
        # A misspelt optional column would silently turn guided training into on-policy training.
        near = difflib.get_close_matches(column, set(present) - set(OPTIONAL), n=1, cutoff=0.8)
        if near:
            raise DataError(f"{where}: column {near[0]!r} is unknown, is it {column!r}? expected {SCHEMA}")
    return False


def from_gsm8k(row: Mapping[str, Any], *, name: str, number: int, where: str) -> Problem:
    """A GSM8K row; the gold loses its thousands commas, the trace its marks, and it ends in a boxed answer."""
    question = _typed(row, "question", str, "a string", where)
    solution = _typed(row, "answer", str, "a string", where)
    gold = _GOLD.search(solution)
    if gold is None:
        raise DataError(f"{where}: column 'answer' must end in a line '#### <gold>', got {solution[-40:]!r}")
    answer = gold.group(1).replace(",", "")
    worked = _CALCULATOR.sub("", solution[: gold.start()]).rstrip()
    trace = f"{worked}\nThe answer is \\boxed{{{answer}}}.".lstrip("\n")
    return Problem(
        id=f"{name}/{number}",
        data_source="openai/gsm8k",
        messages=({"role": "user", "content": question},),
        answer=answer,
        traces=(trace,),
    )


def from_luffy(row: Mapping[str, Any], *, name: str, number: int, where: str) -> Problem:
    """A row of LUFFY's schema. Its id is data source, split and index, or the row's number without an index."""
    extra = row.get("extra_info") or {}
    if not isinstance(extra, Mapping):
        raise _wrong_type("extra_info", "a struct {index, split, ...}", extra, where)
    source = row.get("data_source") or name
    if not isinstance(source, str):
        raise _wrong_type("data_source", "a string", source, where)
    index = extra.get("index", number)
    return Problem(
        id=f"{source}/{extra.get('split', 'default')}/{index}",
        data_source=source,
        messages=_turns(row, "prompt", where),
        answer=_answer(row, where),
        traces=_traces(row, where),
        extra=dict(extra),
    )


def _answer(row: Mapping[str, Any], where: str) -> str | tuple[str, ...]:
    model = _typed(row, "reward_model", Mapping, "a struct {ground_truth, style}", where)
    truth = model.get("ground_truth")
    if isinstance(truth, str) and truth:
        return truth
    if isinstance(truth, list) and truth and all(isinstance(one, str) and one for one in truth):
        return tuple(truth)
    raise _wrong_type("reward_model.ground_truth", "a string that is not empty, or a list of such", truth, where)


def _traces(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    traces = []
    if row.get("target"):
        target = _turns(row, "target", where)
        if len(target) != 1:
            raise DataError(f"{where}: column 'target' must hold one assistant turn, got {len(target)} turns")
        traces.append(target[0]["content"])
    more = row.get("target_lst") or []
    if not isinstance(more, list) or not all(isinstance(text, str) for text in more):
        raise _wrong_type("target_lst", "a list of strings", more, where)
    # dict keeps the first of equal traces, in order; an empty text is no trace.
    return tuple(dict.fromkeys(text for text in [*traces, *more] if text))


def _turns(row: Mapping[str, Any], column: str, where: str) -> tuple[Mapping[str, str], ...]:
    turns = _typed(row, column, list, "a list of {content, role}", where)
    for turn in turns:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise _wrong_type(column, "a list of {content, role} with string values", turn, where)
    if not turns:
        raise DataError(f"{where}: column {column!r} must not be empty")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def _typed(row: Mapping[str, Any], column: str, kind: type, meaning: str, where: str) -> Any:
    value = row.get(column)
    if not isinstance(value, kind):
        raise _wrong_type(column, meaning, value, where)
    return value


def _wrong_type(column: str, meaning: str, value: Any, where: str) -> DataError:
    return DataError(f"{where}: column {column!r} must be {meaning}, got {type(value).__name__} {value!r:.60}")
