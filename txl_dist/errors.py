"""Mistakes of a user and failures of the machine, as exceptions that need no stack trace."""


class UserError(Exception):
    """A user's mistake: names the key or file, what is wrong and what would be right."""


class ConfigError(UserError):
    """All problems of a config, one line each."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


class RunError(UserError):
    """A failure that ends a run although its config is right, such as a full disk; raised on every rank.

    Like a ConfigError it has all problems of all ranks, one line each, and is shown once.
    """

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def describe_os_error(error: OSError, path: object = None) -> str:
    """Return the file and the reason of an error of the operating system.

    Args:
        path: used if the error does not name a file.
    """
    name = error.filename or path
    reason = error.strerror or str(error) or type(error).__name__
    return f"{name}: {reason}" if name else reason


def format_error(error: UserError) -> str:
    """Format an error for the screen: a heading, and its lines indented below it."""
    if isinstance(error, ConfigError):
        count = len(error.problems)
        heading = "The config has a problem:" if count == 1 else f"The config has {count} problems:"
    else:
        heading = "Stopped:"
    return "\n".join([heading, *(f"  {line}" for line in str(error).splitlines())])
