"""What `luffy doctor` says of one thing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    name: str
    found: str
    lacks: str = ""
    """What to do about it; empty where all is well."""
