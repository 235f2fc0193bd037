"""What a user did wrong, as exceptions: told in plain words by the command line, without a stack trace."""


class UserError(Exception):
    """A user's mistake: names the key or the file, what is wrong and what would be right."""


class ConfigError(UserError):
    """All problems of one config, a line each."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


class RunError(UserError):
    """What ends a run though its config is right, as a full disk: every rank raises it, and it is told once."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


def first_line(error: Exception) -> str:
    """What a library says, as far as it helps."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def describe_os_error(error: OSError, path: object = None) -> str:
    """Name the file and the reason of what the operating system refused; `path` stands in where it names no file."""
    name = error.filename or path
    reason = error.strerror or str(error) or type(error).__name__
    return f"{name}: {reason}" if name else reason


def format_error(error: UserError) -> str:
    """Put an error on the screen: a head, and its lines below it."""
    if isinstance(error, ConfigError):
        count = len(error.problems)
        head = "The config has a problem:" if count == 1 else f"The config has {count} problems:"
    else:
        head = "Stopped:"
    return "\n".join([head, *(f"  {line}" for line in str(error).splitlines())])
