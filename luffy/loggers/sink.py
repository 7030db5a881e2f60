"""What a logger has to be able to do, and what it is told at the start."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|AUTH(?!OR(?!IZ))|CREDENTIAL", re.IGNORECASE)
"""Names of environment variables that keep secrets; AUTHOR and XAUTHORITY keep none."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """A run, as a sink gets to know it."""

    folder: Path
    """For what the sink writes on this machine; absent, or what it wrote before."""
    project: str
    name: str
    id: str
    """The same whenever the run goes on; no other run has it."""
    config: dict[str, Any]
    """The resolved configuration, without secrets."""
    online: bool
    """Whether it may send; where to is in the environment. Otherwise nothing leaves the machine."""


class Sink(Protocol):
    appends: bool
    """Whether it can go on in a folder that an earlier process closed in order; else it is built anew."""

    @property
    def last(self) -> int:
        """Newest step that it holds and will not forget; -1: none."""

    def write(self, step: int, numbers: dict[str, float], at: float) -> None:
        """Finite numbers of a step, whose steps never fall; at: seconds since the epoch.

        Raises:
            Exception: whatever its library raises; the record is then counted as lost.
        """

    def close(self) -> None:
        """Wait until everything is where it belongs."""


def without_secrets(value: Any) -> Any:
    """The same with user, password and the values of the query taken out of URLs, and whatever the environment keeps
    under the name of a secret; of keys too."""
    if isinstance(value, dict):
        return {without_secrets(key): without_secrets(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(one) for one in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"(?<=://)\S+@", "***@", value)  # up to the last @: a password may hold / and @
    value = re.sub(r"://\S+", lambda url: re.sub(r"(?<=[?&])([^=&#]+)=[^&#]+", r"\1=***", url[0]), value)
    for name, secret in os.environ.items():
        if SECRET.search(name) and len(secret) >= 8:
            value = value.replace(secret, "***")
    return value
