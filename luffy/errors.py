"""The one exception that ends a command with a sentence instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user can mend: bad input, a missing file, a full disk. The CLI prints it and exits with code 2."""


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Around code that is fed by the user's configuration alone: its ValueError or OSError becomes a UserError.

    Only the first line is kept; libraries add advice for programmers below it.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what}: {first}") from error
