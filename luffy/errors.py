"""The one exception that ends a command with a sentence instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user can mend: bad input, a missing file, a full disk. The CLI prints it and exits with code 2."""


def first_line(error: BaseException) -> str:
    """Of what an exception says, or its name where it says nothing; libraries add advice for programmers below it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Around code that is fed by the user's configuration alone.

    Raises:
        UserError: the first line of its ValueError or OSError, after `what`.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"{what}: {first_line(error)}") from error
