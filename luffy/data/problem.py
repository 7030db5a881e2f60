"""What a problem is, and how a row of LUFFY's or GSM8K's schema becomes one.

LUFFY's columns: data_source, prompt (list of {content, role}), target (list of one {content, role}, or null or
absent), target_lst (optional list of further traces), ability, reward_model {ground_truth, style}, extra_info
{index, split, ...}; and ours, with an entry for each of target and target_lst: target_teachers (names), target_logps
(log-probs of the trace's tokens, EOS included, under who wrote it; an empty list where they are not known).
GSM8K's: question, answer with a last line `#### gold` and calculator marks `<<1+1=2>>`.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

SCHEMA = (
    "prompt and reward_model (optional: target, target_lst, target_teachers, target_logps, data_source, ability, "
    "extra_info)"
)
OPTIONAL = (
    *("target", "target_lst", "target_teachers", "target_logps", "target_ds_qwen_7b_probs"),
    *("data_source", "ability", "extra_info"),
)
GSM8K_COLUMNS = frozenset({"question", "answer"})

Logps = tuple[float, ...]
LEAST = 1e-30  # a stored probability of 0 is one that was rounded

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_GOLD = re.compile(r"\n?####[ \t]*(\S[^\n]*?)\s*\Z")


class DataError(ValueError):
    """The data cannot be used; the message is one sentence that says what is wrong and where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question with a verifiable answer and any number of worked solutions.

    id: stable and unique within its source. messages: role/content turns, the last one the user's.
    answer: the accepted answer, or a tuple of accepted ones. traces: texts, as the teacher wrote them.
    teachers: who wrote each trace; () where nothing is said. trace_logps: log-probs of each trace's tokens under its
    teacher, nats; () of a trace, or as a whole, where they are not known.
    extra: everything else the row said, for reports.
    """

    id: str
    data_source: str
    messages: tuple[Mapping[str, str], ...]
    answer: str | tuple[str, ...]
    traces: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()
    trace_logps: tuple[tuple[float, ...], ...] = ()
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
    traces, teachers, logps = _traces(row, where)
    return Problem(
        id=f"{source}/{extra.get('split', 'default')}/{index}",
        data_source=source,
        messages=_turns(row, "prompt", where),
        answer=_answer(row, where),
        traces=traces,
        teachers=teachers,
        trace_logps=logps,
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


def _traces(row: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Logps, ...]]:
    """(texts, who wrote each, its tokens' log-probs); the latter two () where the row says nothing."""
    texts = []
    if row.get("target"):
        target = _turns(row, "target", where)
        if len(target) != 1:
            raise DataError(f"{where}: column 'target' must hold one assistant turn, got {len(target)} turns")
        texts.append(target[0]["content"])
    texts += _list(row, "target_lst", str, "a list of strings", where)
    teachers = _list(row, "target_teachers", str, "a list of strings", where)
    logps: list[Logps] = [_logps(one, where) for one in _list(row, "target_logps", list, "a list of lists", where)]
    if not logps and row.get("target_ds_qwen_7b_probs"):  # the published column: probabilities, of `target` alone
        logps = [_from_probs(row, where), *[()] * (len(texts) - 1)]
    for column, found in (("target_teachers", teachers), ("target_logps", logps)):
        if found and len(found) != len(texts):
            raise DataError(
                f"{where}: column {column!r} must have an entry for each of {len(texts)} traces, got {len(found)}"
            )
    # the first of equal traces stays, in order; an empty text is no trace
    first = {text: at for at, text in reversed(list(enumerate(texts))) if text}
    kept = sorted(first.values())
    return (
        tuple(texts[at] for at in kept),
        tuple(teachers[at] for at in kept if teachers),
        tuple(logps[at] for at in kept if logps),
    )


def _logps(values: list[Any], where: str) -> Logps:
    if not all(isinstance(x, (int, float)) and x <= 0 for x in values):
        raise DataError(f"{where}: column 'target_logps' must hold log-probs, numbers of at most 0, got {values!r:.60}")
    return tuple(map(float, values))


def _from_probs(row: Mapping[str, Any], where: str) -> Logps:
    values = _list(row, "target_ds_qwen_7b_probs", (int, float), "a list of probabilities", where)
    while values and values[-1] == -1:  # padding, as published
        values = values[:-1]
    if not all(0 < p <= 1 for p in values):
        raise DataError(
            f"{where}: column 'target_ds_qwen_7b_probs' must hold probabilities above 0, got {values!r:.60}"
        )
    return tuple(map(math.log, values))


def _list(row: Mapping[str, Any], column: str, kind: Any, meaning: str, where: str) -> list[Any]:
    found = row.get(column) or []
    if not isinstance(found, list) or not all(isinstance(one, kind) for one in found):
        raise _wrong_type(column, meaning, found, where)
    return found


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
