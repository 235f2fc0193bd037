"""Spell out the command line for Hydra so that it means what its author meant.

There are three kinds of values. Most follow Hydra's grammar. A text (`prompt=`) is taken literally. So is a path
(`run.dir=`), unless it is a list, a sweep or quoted; an interpolation `${...}` in it is resolved.
"""

import argparse
import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString, Sweep
from hydra.errors import HydraException, MissingConfigException
from omegaconf import grammar_parser
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from txl_dist.config.quoting import escape_interpolations, quote_for_hydra, quote_for_shell
from txl_dist.errors import ConfigError, UserError, first_line

PACKAGE = Path(__file__).resolve().parents[1]
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())

TEXT_KEYS = {"prompt", "text", "tracking.prompts", "tracking.notes"}
CORPUS_KEYS = {"corpus.path", "corpus.train", "corpus.valid", "corpus.test"}
PATH_KEYS = {"run", "run.dir", "data.dir", "data_dir", "file", "from", "to", "out", "tokenizer_from"} | CORPUS_KEYS
PATH_KEYS |= {"tokenizer.vocab", "tokenizer.model"}
PATH_KEYS |= {f"tracking.{key}" for key in ("project", "name", "entity", "group", "job_type", "tags")}
LIST_KEYS = {"prompt", "run", "tracking.prompts", "tracking.tags"} | CORPUS_KEYS

# Turn off what Hydra does by default: a folder of its own for every start, and logging to a file.
HYDRA_SETTINGS = [
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
    "hydra/help=txl_dist",
]

UNREADABLE = object()
MAX_SHOWN = 200  # characters of an override in a message

# An element of a list: a quoted string, or everything up to the next comma.
ELEMENT = re.compile(r"""\s*('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^,]*?)\s*(?:,|$)""", re.DOTALL)


class CommandLine:
    """A command line: Hydra's flags, wherever they stand, and overrides.

    Attributes:
        given: the overrides as they were typed.
        spelled: the same overrides as Hydra is to read them.
        flags: the rest.
    """

    def __init__(self, argv: list[str]):
        # deepspeed adds --local_rank, beside the variable LOCAL_RANK.
        arguments = with_info_topic(argument for argument in argv if not argument.startswith("--local_rank="))
        parsed = parse_flags(arguments)
        self.given: list[str] = parsed.overrides
        self.flags = remove_each(arguments, self.given)
        self.completion: bool = parsed.shell_completion
        self.sweeping = parsed.multirun or "hydra.mode=MULTIRUN" in self.given
        self.spelled = [spell_out(override, self.sweeping) for override in self.given]
        chosen = [f"--{name}" for name in ("run", "multirun", "cfg", "info") if getattr(parsed, name)]
        if len(chosen) > 1:
            raise UserError(f"{' and '.join(chosen)}: give only one of them")
        if parsed.resolve and not (parsed.cfg or parsed.help):
            raise UserError("--resolve: is for --cfg job, hydra or all, or for --help; add one of them")

    def for_hydra(self) -> list[str]:
        """Return the arguments with the flags last: Hydra's parser accepts overrides in one stretch only.

        Raises:
            ConfigError: with every override that cannot be read.
        """
        if self.completion:
            return [*self.given, *self.flags]  # `install=bash` and the like are not overrides
        described = map(describe_unreadable, self.given, self.spelled)
        problems = [problem for problem in described if problem is not None]
        if problems:
            raise ConfigError(problems)
        return [*self.spelled, *HYDRA_SETTINGS, *self.flags]

    @contextlib.contextmanager
    def errors_described(self, composing: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Turn what Hydra or OmegaConf raises while they compose the config into a ConfigError."""
        try:
            yield
        except (HydraException, OmegaConfBaseException, ValueError, AssertionError) as error:
            if not composing():
                raise
            raise ConfigError([self.describe(error)]) from error

    def describe(self, error: Exception) -> str:
        """Describe an error of Hydra or OmegaConf in plain words, with the override as it was typed."""
        if isinstance(error, MissingConfigException) and error.options:
            group, _, name = str(error.missing_cfg_file).rpartition("/")
            return f"{group}={name}: is not one of the choices: {', '.join(error.options)}"
        if isinstance(error, OmegaConfBaseException) and error.full_key:
            typed = next((given for given in self.given if key_of(given) == error.full_key), error.full_key)
            reason = re.sub(r'^\w+ raised while resolving interpolation: "?(.*?)"?$', r"\1", first_line(error))
            return f"{shortened(typed)}: {reason}"
        text = str(error).partition("Config search path")[0].partition("See https://")[0]
        culprit = self.find_culprit(text)
        for given, spelled in zip(self.given, self.spelled, strict=True):
            text = text.replace(spelled, given)
        if "Ambiguous value" in text and culprit:
            return (
                f"{shortened(culprit)}: is several values; give one, or a list in [brackets], or a text in quotes of "
                "its own, or add --multirun to try one after the other"
            )
        reason = "; ".join(line.strip().rstrip(".") for line in text.splitlines() if line.strip())
        return reason if culprit is None or culprit in reason else f"{shortened(culprit)}: {reason}"

    def find_culprit(self, message: str) -> str | None:
        """Find the override that a message is about: it quotes the override, its key or the last part of its key."""
        longest_first = sorted(zip(self.given, self.spelled, strict=True), key=lambda pair: -len(pair[1]))
        for given, spelled in longest_first:
            if spelled in message:
                return given
        for given in self.given:
            if re.search(rf"(?<![\w.]){re.escape(key_of(given))}(?![\w.])", message):
                return given
        for given in self.given:
            if f"'{key_of(given).rpartition('.')[2]}'" in message:
                return given
        return None


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Parse Hydra's own flags, among overrides in any order.

    Raises:
        UserError: where a flag is not known, or its value is missing or wrong.
    """

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; --hydra-help lists all flags")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_intermixed_args(arguments)


def with_info_topic(arguments: Iterable[str]) -> list[str]:
    """Write out the topic of a bare `--info`: argparse would take the override after it for the topic."""
    completed: list[str] = []
    for argument in arguments:
        if completed and completed[-1] in ("--info", "-i") and ("=" in argument or argument.startswith("~")):
            completed[-1] = "--info=all"
        completed.append(argument)
    return completed


def remove_each(items: list[str], removed: list[str]) -> list[str]:
    """Return `items` without `removed`, a subsequence of it."""
    rest = iter(removed)
    following = next(rest, None)
    kept = []
    for item in items:
        if item == following:
            following = next(rest, None)
        else:
            kept.append(item)
    return kept


def is_group(key: str) -> bool:
    return bool(key) and (CONF / key).is_dir()


def choices(group: str) -> list[str]:
    """List the configs of a group, such as the experiments."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def key_of(override: str) -> str:
    """Return the key of an override, without its prefix."""
    return override.partition("=")[0].lstrip("+~")


def shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


# -------------------------------------------------------------------------------------------------- spelling out


def spell_out(argument: str, sweeping: bool = False) -> str:
    """Spell out an override for Hydra.

    `a.b=1` becomes `++a.b=1`, so that an unknown key reaches parse_config and is reported with all other problems
    (Hydra would stop at the first).

    Args:
        sweeping: commas separate the values of a sweep (--multirun).
    """
    prefix, equals, value = argument.partition("=")
    key = key_of(argument)
    if not equals or prefix[:1] in ("~", "-") or "@" in key or key.startswith("hydra") or is_group(key):
        return argument
    if key in TEXT_KEYS:
        value = spell_text(value, many=key in LIST_KEYS)
    elif key in PATH_KEYS:
        value = spell_path(value, key in LIST_KEYS, sweeping)
    return f"++{key}={value}"


def spell_text(value: str, many: bool) -> str:
    """Quote a text, unless it is a quoted string of Hydra's grammar or, with `many`, a list of such strings."""
    parsed = parse(value)
    is_quoted = isinstance(parsed, QuotedString)
    is_list = many and isinstance(parsed, list) and all(isinstance(element, QuotedString) for element in parsed)
    if (is_quoted or is_list) and value == value.strip():
        return value
    return quote_for_hydra(escape_interpolations(value))


def spell_path(value: str, many: bool, sweeping: bool) -> str:
    """Quote a path, unless it is quoted, escaped, null, a list, a section or a sweep in Hydra's grammar."""
    parsed = parse(value)
    if parsed is None or isinstance(parsed, QuotedString | dict):
        return value
    if isinstance(parsed, Sweep) and (sweeping or not getattr(parsed, "simple_form", False)):
        return value
    if isinstance(parsed, str) and "\\" in value:
        return value
    if "${" in value and not interpolates(value):
        value = escape_interpolations(value)
    if many and value.startswith("[") and value.endswith("]"):
        is_list = isinstance(parsed, list) and all(isinstance(element, str | QuotedString) for element in parsed)
        return value if is_list else f"[{','.join(spell_elements(value[1:-1]))}]"
    if sweeping and parsed is UNREADABLE and "," in value:
        return ",".join(spell_elements(value))
    return quote_for_hydra(value)


def spell_elements(value: str) -> Iterator[str]:
    """Spell out the paths of a list, without its brackets."""
    for match in ELEMENT.finditer(value):
        if match[0]:
            yield spell_path(match[1], many=False, sweeping=False)


def parse(value: str) -> Any:
    """Parse a value by Hydra's grammar; return UNREADABLE where that fails."""
    try:
        return OverridesParser.create().parse_override(f"key={value}")._value  # value() drops the quotes
    except (HydraException, ValueError, RecursionError):
        return UNREADABLE


def interpolates(value: str) -> bool:
    """Return whether OmegaConf can read the interpolations in a value."""
    try:
        grammar_parser.parse(value)
    except GrammarParseError:
        return False
    return True


def describe_unreadable(given: str, spelled: str) -> str | None:
    """Describe why Hydra cannot read an override; None where it can."""
    key, equals, value = given.partition("=")
    if not equals and not given.startswith("~"):
        return f"{shortened(given)}: is not of the form KEY=VALUE; a value with spaces needs quotes in the shell"
    if not key_of(given) or not is_readable(f"{key_of(given)}=0"):
        return f"{shortened(given)}: {key!r} is not a key"
    if not is_readable(spelled):
        quoted = quote_for_shell(f"{key}={quote_for_hydra(value)}")
        return f"{shortened(given)}: the value cannot be read; put a text in quotes of its own, as {shortened(quoted)}"
    if equals and is_group(key_of(given)) and not isinstance(parse(value), str | list | Sweep):
        return f"{shortened(given)}: is not one of the choices: {', '.join(choices(key_of(given)))}"
    return None


def is_readable(override: str) -> bool:
    """Return whether Hydra can parse an override."""
    try:
        OverridesParser.create().parse_override(override)
    except (HydraException, ValueError, RecursionError):
        return False
    return True
