"""vLLM's reasons for not starting, in the words of this project's settings."""

import re

TOO_SMALL = re.compile(r"max seq len \((\d+)\), \(?([\d.]+) GiB KV cache is needed.*memory \(([\d.]+) GiB\)", re.DOTALL)
NONE_LEFT = "No available memory for the cache blocks"


def explain(text: str, otherwise: str = "") -> str:
    """One sentence: what is missing, how much of it and which setting to change; or else the line that says most, and
    what to do then."""
    if found := TOO_SMALL.search(text):
        length, needed, there = int(found[1]), float(found[2]), float(found[3])
        return (
            f"one sequence of {length} tokens needs {needed:g} GiB of KV cache and there are {there:g}, so "
            f"{needed - there:.2f} GiB are missing; raise rollout.kv_cache_gib to {needed:g} or more (on a GPU "
            f"rollout.memory_fraction does too), or lower rollout.max_tokens or data.max_prompt_tokens"
        )
    if NONE_LEFT in text:
        return (
            "no memory is left for a KV cache; raise rollout.kv_cache_gib, or on a GPU rollout.memory_fraction, or "
            "share the model with rollout.tensor_parallel"
        )
    return _telling_line(text) + otherwise


def _telling_line(text: str) -> str:
    """The last line that names an error, without the prefixes of vLLM's logs."""
    lines = [re.sub(r"^\([^)]*\) (ERROR [\d-]+ [\d:]+ \[[^]]*\] )?", "", line).strip() for line in text.splitlines()]
    lines = [_told_by_pydantic(line) for line in lines if line and not line.startswith("For further information")]
    errors = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception): ", line)]
    told = [line for line in errors if "Engine core" not in line and "validation error" not in line]
    return (told or errors or lines or ["no word"])[-1]


def _told_by_pydantic(line: str) -> str:
    """Its errors take three lines: of which class, why, and where to read on."""
    found = re.match(r"(\w+) error, (.*?)(?: \[type=.*)?$", line)
    return f"{found[1]}Error: {found[2]}" if found else line
