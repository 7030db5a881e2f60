"""What `luffy doctor` says of one thing."""

from collections.abc import Callable
from dataclasses import dataclass

from luffy.errors import first_line


@dataclass(frozen=True)
class Finding:
    name: str
    found: str
    lacks: str = ""
    """What to do about it; empty where all is well."""


REMEDY = "reinstall what the message names, or everything: scripts/setup.sh"


def guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """What `check` finds. A library that cannot even be imported is what doctor is asked about, so whatever it raises
    is a finding too."""
    try:
        return check()
    except Exception as error:
        return Finding(name, f"cannot be examined: {type(error).__name__}: {first_line(error)}", REMEDY)
