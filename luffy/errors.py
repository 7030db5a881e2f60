"""The one exception that ends a command with a sentence instead of a traceback."""


class UserError(ValueError):
    """Something the user can mend: bad input, a missing file, a full disk. The CLI prints it and exits with code 2."""
