"""LUFFY's training and evaluation files: data_source, prompt (list of {content, role}), target (list of one {content,
role}, or null or absent), target_lst (optional list of further traces), ability, reward_model {ground_truth, style},
extra_info {index, split, ...}; and ours, with an entry for each of target and target_lst: target_teachers (names),
target_logps (log-probs of the trace's tokens, EOS included, under who wrote it; [] where they are not known).
"""

import math
from collections.abc import Mapping, Sequence

from luffy.data.columns import (
    Row,
    answers,
    conversation,
    first_of_equals,
    lists,
    one_for_each,
    texts,
    turns,
    typed,
    wrong_type,
)
from luffy.data.problem import DataError, Logps, Problem


def read_luffy(row: Row, *, name: str, number: int, where: str) -> Problem:
    """Its id is data source, split and index, or the row's number without an index."""
    extra = row.get("extra_info") or {}
    if not isinstance(extra, Mapping):
        raise wrong_type("extra_info", "a struct {index, split, ...}", extra, where)
    source = row.get("data_source") or name
    if not isinstance(source, str):
        raise wrong_type("data_source", "a string", source, where)
    index = extra.get("index", number)
    traces, teachers, logps = _traces(row, where)
    return Problem(
        id=f"{source}/{extra.get('split', 'default')}/{index}",
        data_source=source,
        messages=conversation(row, "prompt", where),
        answer=_answer(row, where),
        traces=traces,
        teachers=teachers,
        trace_logps=logps,
        extra=dict(extra),
    )


def _answer(row: Row, where: str) -> str | tuple[str, ...]:
    model = typed(row, "reward_model", Mapping, "a struct {ground_truth, style}", where)
    try:
        return answers(model, "ground_truth", where)
    except DataError:
        truth = model.get("ground_truth")
        meaning = "a string, or a list of strings that are not empty"
        raise wrong_type("reward_model.ground_truth", meaning, truth, where) from None


def _traces(row: Row, where: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Logps, ...]]:
    """(texts, who wrote each, its tokens' log-probs); the latter two () where the row says nothing."""
    found = []
    if row.get("target"):
        target = turns(row, "target", where)
        if [turn["role"] for turn in target] != ["assistant"]:
            said = ", ".join(turn["role"] for turn in target)
            raise DataError(f"{where}: column 'target' must hold one assistant turn, got {len(target)} turns ({said})")
        found.append(target[0]["content"])
    found += texts(row, "target_lst", where)
    teachers = texts(row, "target_teachers", where)
    logps = [_logps(one, where) for one in lists(row, "target_logps", where)]
    if not logps and row.get("target_ds_qwen_7b_probs"):  # the published column: probabilities, of `target` alone
        if not row.get("target"):
            raise DataError(f"{where}: column 'target_ds_qwen_7b_probs' is of 'target', which is missing")
        logps = [_from_probs(row, where), *[()] * (len(found) - 1)]
    one_for_each("target_teachers", teachers, found, where)
    one_for_each("target_logps", logps, found, where)
    kept = first_of_equals(found)
    return (
        tuple(found[at] for at in kept),
        tuple(teachers[at] for at in kept if teachers),
        tuple(logps[at] for at in kept if logps),
    )


def _logps(values: Sequence[float], where: str) -> Logps:
    if not all(isinstance(x, int | float) and x <= 0 for x in values):
        raise DataError(f"{where}: column 'target_logps' must hold log-probs, numbers of at most 0, got {values!r:.60}")
    return tuple(map(float, values))


def _from_probs(row: Row, where: str) -> Logps:
    values = typed(row, "target_ds_qwen_7b_probs", list, "a list of probabilities", where)
    while values and values[-1] == -1:  # padding, as published
        values = values[:-1]
    if not all(isinstance(p, int | float) and 0 < p <= 1 for p in values):
        raise DataError(
            f"{where}: column 'target_ds_qwen_7b_probs' must hold probabilities above 0, got {values!r:.60}"
        )
    return tuple(map(math.log, values))
