"""What is asked for, and what of it decides the bytes that come out."""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luffy.data.rows import files_of, is_hub_id
from luffy.errors import UserError

OPENR1 = "open-r1/OpenR1-Math-220k:default"
"""The subset that LUFFY's training set is made of (arXiv 2504.14945)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """
    source, split, limit: as `load_problems` takes them, or "openr1".
    revision: of a Hugging Face data set; None: the newest when the work began.
    traces: at most so many of each problem, the first that survive; 0: questions alone, with or without a trace.
    max_tokens: of a trace, its think tags included and no EOS, as published.
    max_prompt_tokens: over all turns; None: training filters by its own prompt style and limit.
    tokenizer: folder, Hugging Face id or `embedded:` name. Published: Qwen2.5's.
    verify: grader that judges the traces in place of the source's own marks.
    system: put LUFFY's published system turn first where a problem has none.
    complement: source of problems to leave out.
    part_rows: rows of the source that a kill may cost.
    Raises ValueError for counts that cannot be.
    """

    source: str
    split: str | None = None
    revision: str | None = None
    limit: int | None = None
    traces: int = 1
    max_tokens: int = 8192
    max_prompt_tokens: int | None = None
    tokenizer: str = "Qwen/Qwen2.5-Math-7B"
    verify: str | None = None
    system: bool = True
    complement: str | None = None
    part_rows: int = 500

    def __post_init__(self) -> None:
        for name in ("limit", "max_tokens", "max_prompt_tokens", "part_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"prepare: {name} must be at least 1, got {value}")
        if self.traces < 0:
            raise ValueError(f"prepare: traces must be at least 0, got {self.traces}")

    @property
    def place(self) -> str:
        return OPENR1 if self.source == "openr1" and not Path(self.source).exists() else self.source


def record(options: Options) -> dict[str, Any]:
    """Everything that decides the result, as JSON values: the options, and what the sources held.

    Files are known by their bytes, a data set on the Hub by its commit: work that goes on must not mix two.
    """
    found = dataclasses.asdict(options)
    if is_hub_id(options.place):
        found["revision"] = _commit(options)
    sources = {"source": options.place} | ({"complement": options.complement} if options.complement else {})
    found["sha256"] = {name: _digests(place, options.split) for name, place in sources.items()}
    return found


def _digests(place: str, split: str | None) -> dict[str, str]:
    path = Path(place).expanduser()
    files = files_of(path, split) if path.is_dir() else [path] if path.is_file() else []
    return {file.name: digest(file) for file in files}


def digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _commit(options: Options) -> str | None:
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(options.place.partition(":")[0], revision=options.revision).sha
    except Exception as error:  # of whichever HTTP client
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(
            f"{options.place}: the Hugging Face data set could not be found, offline or no such data set ({reason}); "
            "download its parquet files elsewhere and give their folder instead"
        ) from error
