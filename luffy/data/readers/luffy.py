"""LUFFY's training and evaluation files: data_source, prompt (list of {content, role}), target (list of one {content,
role}, or null or absent), target_lst (optional list of further traces), ability, reward_model {ground_truth, style},
extra_info {index, split, ...}.
"""

from collections.abc import Mapping

from luffy.data.columns import Row, distinct, texts, turns, typed, wrong_type
from luffy.data.problem import DataError, Problem


def read_luffy(row: Row, *, name: str, number: int, where: str) -> Problem:
    """Its id is data source, split and index, or the row's number without an index."""
    extra = row.get("extra_info") or {}
    if not isinstance(extra, Mapping):
        raise wrong_type("extra_info", "a struct {index, split, ...}", extra, where)
    source = row.get("data_source") or name
    if not isinstance(source, str):
        raise wrong_type("data_source", "a string", source, where)
    index = extra.get("index", number)
    return Problem(
        id=f"{source}/{extra.get('split', 'default')}/{index}",
        data_source=source,
        messages=turns(row, "prompt", where),
        answer=_answer(row, where),
        traces=_traces(row, where),
        extra=dict(extra),
    )


def _answer(row: Row, where: str) -> str | tuple[str, ...]:
    model = typed(row, "reward_model", Mapping, "a struct {ground_truth, style}", where)
    truth = model.get("ground_truth")
    if isinstance(truth, str) and truth:
        return truth
    if isinstance(truth, list) and truth and all(isinstance(one, str) and one for one in truth):
        return tuple(truth)
    raise wrong_type("reward_model.ground_truth", "a string that is not empty, or a list of such", truth, where)


def _traces(row: Row, where: str) -> tuple[str, ...]:
    traces = []
    if row.get("target"):
        target = turns(row, "target", where)
        if len(target) != 1:
            raise DataError(f"{where}: column 'target' must hold one assistant turn, got {len(target)} turns")
        traces.append(target[0]["content"])
    return distinct([*traces, *texts(row, "target_lst", where)])
