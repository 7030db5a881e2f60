"""Attributes of other packages, replaced and put back."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

Replacement = tuple[Any, str, Any]
"""(module or class, name of an attribute that it has, what takes its place)"""


class Patch:
    """Of one package.

    package: as it is installed. versions: those that this was written for, by their beginnings ("1.16.").
    replacements: called once they are needed; raises ImportError or AttributeError where the package is another than it
    was.
    """

    def __init__(self, package: str, versions: tuple[str, ...], replacements: Callable[[], Iterable[Replacement]]):
        self.package, self.versions = package, versions
        self._replacements = replacements
        self._originals: list[Replacement] = []
        self._ours: list[Any] = []

    def apply(self) -> bool:
        """Whether it is applied now. A second time changes nothing; an unknown version or one that lacks what would be
        replaced is left as it is, with a warning.

        Raises:
            ImportError: the package is not installed.
        """
        if self._originals:
            return True
        try:
            found = version(self.package)
        except PackageNotFoundError as error:
            raise ImportError(f"luffy_kernels.compat: {self.package} is not installed") from error
        if not f"{found}.".startswith(self.versions):
            self._refuse(f"is written for {self.package} {', '.join(v + '*' for v in self.versions)}, not {found}")
            return False
        try:
            replacements = list(self._replacements())
            originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
        except (ImportError, AttributeError) as error:
            self._refuse(f"does not find its way in {self.package} {found} ({error})")
            return False
        self._originals, self._ours = originals, [ours for _, _, ours in replacements]
        for replacement in replacements:
            setattr(*replacement)
        return True

    def undo(self) -> None:
        """Put back what was there, but where somebody else has put something since; else harmless."""
        while self._originals:
            (owner, name, theirs), ours = self._originals.pop(), self._ours.pop()
            if vars(owner).get(name) is ours:
                setattr(owner, name, theirs)

    def _refuse(self, why: str) -> None:
        warnings.warn(f"luffy_kernels.compat {why}; {self.package} is left as it is", RuntimeWarning, stacklevel=3)


def everywhere(package: str, owner: Any, name: str, ours: Any) -> Iterable[Replacement]:
    """Where it is defined, and in every module of the package that has imported it by name already."""
    theirs = getattr(owner, name)
    yield owner, name, ours
    for module in [module for key, module in sys.modules.items() if f"{key}.".startswith(f"{package}.")]:
        if module is not owner and getattr(module, name, None) is theirs:
            yield module, name, ours
