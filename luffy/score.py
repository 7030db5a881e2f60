"""`luffy data score`: log-probs of stored traces under the model that wrote them.

Both tokenizers read the whole file before a weight is loaded. Scores are kept in parts, each whole or absent, until all
are there; then the file is written, whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luffy.config import ModelConfig, RolloutConfig
from luffy.console import say
from luffy.data import Problem, load_problems
from luffy.data.rows import read_rows
from luffy.data.tables import Row, blocks, copy_with
from luffy.errors import UserError, user_errors
from luffy.files import disk_errors, temporary_name, write_json, write_text
from luffy.teacher import Ids, Teacher, template_of

if TYPE_CHECKING:
    from luffy.rollout.engine import Engine

ROWS = 128
"""Rows of a part."""


def texts_of(row: Mapping[str, Any]) -> list[str]:
    """Its traces as the columns have them, equal and empty ones too: target, then target_lst."""
    return [turn["content"] for turn in row.get("target") or []] + list(row.get("target_lst") or [])


def teachers_of(row: Mapping[str, Any], default: str) -> list[str]:
    """Who wrote each trace; `default` where nobody says."""
    count = len(texts_of(row))
    return [name or default for name in row.get("target_teachers") or [""] * count]


def score(args: Namespace, student: ModelConfig) -> Counter[str]:
    """What the command does, with its options in `args`; counts of traces and tokens."""
    from luffy import dtypes
    from luffy.load import identity, read_config
    from luffy.rollout.vllm_engine import VllmEngine
    from luffy.sources import load_template, resolve

    model = ModelConfig(name=args.model)
    path = resolve(model)
    with user_errors("score"):
        mine = load_template(resolve(student), student)
        template = template_of(path, mine, args.teacher_template)
    teacher = Teacher(
        name=args.teacher or Path(args.model).name,
        identity=identity(path),
        student=mine,
        template=template,
        own_prompt=args.teacher_template is not None,
        max_tokens=min(args.max_tokens, read_config(path, model).max_position_embeddings - 1),
    )
    rollout = RolloutConfig(memory_fraction=args.memory_fraction, kv_cache_gib=args.kv_cache_gib)

    def start(max_model_len: int) -> Engine:
        dtype, eos = dtypes.resolve(args.dtype), template.eos_token_id
        return VllmEngine(path, rollout, dtype=dtype, eos_token_id=eos, max_model_len=max_model_len)

    return score_file(Path(args.file), Path(args.out), teacher, start)


def score_file(source: Path, target: Path, teacher: Teacher, start: Callable[[int], Engine]) -> Counter[str]:
    """Write `source` to `target` with `target_teachers` and `target_logps`; counts of traces.

    Traces that the file says are of another teacher keep what they have. Of equal files and settings an interrupted
    call is gone on with, part by part.

    Args:
        start: an engine for sequences of so many tokens; it is closed here.

    Raises:
        UserError: the tokenizers disagree, there is nothing to score, or what an interrupted call left is of other
            settings.
    """
    _check_paths(source, target)
    with user_errors("score"):
        problems = load_problems(source)
    counts, longest = survey(source, problems, teacher)
    parts = target.with_name(f"{target.name}.parts")
    with disk_errors("score"):
        _open_parts(parts, {"file": _digest(source)} | teacher.settings())
        _score_parts(source, parts, problems, teacher, lambda: start(longest + 1))
        temporary = temporary_name(target)
        copy_with(source, temporary, map(json.loads, (part.read_text() for part in _all_parts(parts))), ROWS)
        temporary.replace(target)
        shutil.rmtree(parts)
    return counts


def survey(source: Path, problems: Sequence[Problem], teacher: Teacher) -> tuple[Counter[str], int]:
    """(counts of traces and tokens, tokens of the longest sequence), both tokenizers having read everything."""
    counts, longest, others = Counter[str](), 0, set[str]()
    for rows, those in _beside(source, problems):
        for row, problem in zip(rows, those, strict=True):
            for text, who in zip(texts_of(row), teachers_of(row, teacher.name), strict=True):
                counts["traces"] += 1
                if who != teacher.name:
                    counts["of other teachers"] += 1
                    others.add(who)
                    continue
                found = _sequence(teacher, problem, text)
                counts["scored" if isinstance(found, tuple) else found] += 1
                if isinstance(found, tuple):
                    counts["tokens"] += len(found[1])
                    longest = max(longest, sum(map(len, found)))
    if not longest:
        which = f"; the file's teachers are {', '.join(sorted(others))} (--teacher)" if others else ""
        said = ", ".join(f"{count} {what}" for what, count in counts.items())
        raise UserError(f"score: {source} has no trace of {teacher.name} that can be scored ({said or 'none'}){which}")
    return counts, longest


def _sequence(teacher: Teacher, problem: Problem, text: str) -> tuple[Ids, Ids] | str:
    """(prompt, trace), or why it is not scored."""
    if not text:
        return "empty"
    try:
        found = teacher.sequence(problem, text)
    except UserError:
        raise
    except ValueError:
        return "with an EOS inside"
    return found if sum(map(len, found)) <= teacher.max_tokens else "too long"


def _score_parts(
    source: Path, parts: Path, problems: Sequence[Problem], teacher: Teacher, start: Callable[[], Engine]
) -> None:
    engine = None
    total = -(-len(problems) // ROWS)
    try:
        for number, (rows, those) in enumerate(_beside(source, problems)):
            part = parts / f"part-{number:06d}.json"
            if part.exists():
                continue
            engine = engine or start()
            write_text(part, json.dumps(_scores(rows, those, teacher, engine)))
            say(f"part {number + 1} of about {total} scored")
    finally:
        if engine is not None:
            engine.close()


def _scores(rows: list[Row], problems: Sequence[Problem], teacher: Teacher, engine: Engine) -> list[Row]:
    """The new columns of a block. Its sequences go to the engine together, so that they are computed together again
    where the block is done again."""
    new, asked, places = [], [], []
    for row, problem in zip(rows, problems, strict=True):
        texts, who = texts_of(row), teachers_of(row, teacher.name)
        logps = [list(old) for old in row.get("target_logps") or [[]] * len(texts)]
        for at, text in enumerate(texts):
            if who[at] != teacher.name:
                continue
            found, logps[at] = _sequence(teacher, problem, text), []
            if isinstance(found, tuple):
                asked.append(found)
                places.append((logps, at))
        new.append({"target_teachers": who, "target_logps": logps})
    scored = engine.score([prompt + trace for prompt, trace in asked]) if asked else []
    for (logps, at), (_, trace), values in zip(places, asked, scored, strict=True):
        # rounded to what fp32 knows of a log-prob; vLLM's may be a hair above 0
        logps[at] = [min(0.0, round(logp, 6)) for logp in values[-len(trace) :]]
    return new


def _beside(source: Path, problems: Sequence[Problem]) -> Iterator[tuple[list[Row], Sequence[Problem]]]:
    """Blocks of the file's rows, each with its problems."""
    at = 0
    for rows in blocks(source, ROWS):
        yield rows, problems[at : at + len(rows)]
        at += len(rows)


def _check_paths(source: Path, target: Path) -> None:
    if source.suffix not in (".parquet", ".jsonl") or not source.is_file():
        raise UserError(f"score: {source} must be a .parquet or .jsonl file in LUFFY's schema")
    if target.suffix != source.suffix:
        raise UserError(f"score: --out must end in {source.suffix} as {source} does, got {target}")
    if target.exists():
        raise UserError(f"score: {target} exists already; choose another --out, nothing is overwritten")
    if not target.resolve().parent.is_dir():
        raise UserError(f"score: the folder of --out {target} does not exist")
    with user_errors("score"):
        first = next(read_rows(source), None)
    missing = [column for column in ("prompt", "reward_model") if first and column not in first.values]
    if missing:
        raise UserError(f"score: {source} is not in LUFFY's schema, it has no column {missing[0]!r}; see docs/data.md")


def _open_parts(parts: Path, settings: dict[str, Any]) -> None:
    made, settings = parts / "made-of.json", json.loads(json.dumps(settings))
    if made.exists():
        before = json.loads(made.read_text())
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise UserError(f"score: {parts} is of a call with another {changed[0]}; finish that one, or remove it")
        return
    parts.mkdir(exist_ok=True)
    write_json(made, settings)


def _all_parts(parts: Path) -> list[Path]:
    return sorted(parts.glob("part-*.json"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
