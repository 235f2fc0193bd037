"""W&B's settings: where they come from, which are refused, and whether there is a key to log in with."""

import netrc
import os
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import ValidationError

from txl_dist.config.schema import TrackingConfig
from txl_dist.errors import describe_os_error, first_line
from txl_dist.tracking.services.wandb_id import MAX_LENGTH, RESERVED

# Values of WANDB_MODE.
ONLINE = ("online", "run", "shared")
OFFLINE = ("offline", "dryrun")

# The most characters that W&B's server accepts; its client checks some of these limits only.
LONGEST = {"WANDB_NAME": MAX_LENGTH, "WANDB_RUN_GROUP": MAX_LENGTH, "WANDB_RUN_ID": MAX_LENGTH, "WANDB_JOB_TYPE": 64}


class Key(NamedTuple):
    """W&B's names of what a key of tracking sets: its variable, its setting and the argument of wandb.init."""

    variable: str
    setting: str
    argument: str


KEYS = {
    "project": Key("WANDB_PROJECT", "project", "project"),
    "name": Key("WANDB_NAME", "run_name", "name"),
    "entity": Key("WANDB_ENTITY", "entity", "entity"),
    "group": Key("WANDB_RUN_GROUP", "run_group", "group"),
    "job_type": Key("WANDB_JOB_TYPE", "run_job_type", "job_type"),
    "tags": Key("WANDB_TAGS", "run_tags", "tags"),
    "notes": Key("WANDB_NOTES", "run_notes", "notes"),
}


def given_keys(tracking: TrackingConfig) -> dict[str, Any]:
    """Return the keys of tracking that W&B takes and that are given, by their names."""
    values = {key: getattr(tracking, key) for key in KEYS}
    return {key: value for key, value in values.items() if value is not None}


def default_mode(settings: Any) -> str:
    """Return the mode of W&B's settings; if they do not set it, online with a key to log in with, else offline."""
    if os.environ.get("WANDB_MODE") or settings.mode not in ONLINE:
        return settings.mode
    return "online" if has_key(settings) else "offline"


def has_key(settings: Any) -> bool:
    """Return whether there is a key for W&B's server, in the environment or in .netrc as `wandb login` writes it."""
    if settings.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = [urlsplit(settings.base_url).netloc]
    if settings.base_url == type(settings)().base_url:
        hosts.append("api.wandb.ai")  # the former address of the public server, for which old keys are valid
    given = os.environ.get("NETRC")
    paths = map(os.path.expanduser, [given] if given else ["~/.netrc", "~/_netrc"])
    try:
        keys = netrc.netrc(next(filter(os.path.exists, paths), os.devnull))
    except (OSError, ValueError, netrc.NetrcParseError):
        return False
    return any(map(keys.authenticators, hosts))


def ignored_variables(options: dict[str, Any]) -> Iterator[str]:
    """Describe the environment variables for which the config or the run directory has another value."""
    sources = {
        "WANDB_MODE": ("mode", "tracking.mode"),
        **{names.variable: (names.argument, f"tracking.{key}") for key, names in KEYS.items()},
        "WANDB_RUN_ID": ("id", "RUN_DIR/wandb_id"),
        "WANDB_DIR": ("dir", "run.dir"),
        "WANDB_RESUME": ("resume", "txl_dist"),
    }
    for name, (option, source) in sources.items():
        value = options.get(option)
        text = ",".join(value) if isinstance(value, list) else value
        if value is not None and os.environ.get(name) not in (None, "", text):
            yield f"{name} ({source} has {text})"


def refused_settings(tracking: TrackingConfig) -> Iterator[str]:
    """Describe which environment variables and tracking.* keys W&B refuses, by its own rules."""
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith("WANDB_")}
    keys = given_keys(tracking)
    if not variables and not keys:
        return
    try:
        import wandb

        settings = wandb.Settings(resume="allow")
    except Exception:  # a broken package, which is left out when the run starts
        return
    for name, value in variables.items():
        try:
            settings.model_copy().update_from_env_vars({name: value})
        except (ValueError, TypeError, wandb.errors.Error) as error:
            yield f"{name}: W&B refuses it ({reason(error)})"
        yield from too_long(name, name, value)
    for key, value in keys.items():
        names = KEYS[key]
        try:
            setattr(settings.model_copy(), names.setting, value)
        except (ValueError, TypeError, wandb.errors.Error) as error:
            yield f"tracking.{key}: W&B refuses it ({reason(error)})"
        yield from too_long(f"tracking.{key}", names.variable, value)
    if set(keys.get("entity", "")) & set(RESERVED):
        yield f"tracking.entity={tracking.entity}: is not the name of a W&B user or team, which has none of {RESERVED}"


def too_long(key: str, variable: str, value: Any) -> Iterator[str]:
    """Describe a value that is longer than W&B's server accepts for a variable."""
    longest = LONGEST.get(variable)
    if longest is not None and len(value) > longest:
        yield f"{key}: has {len(value)} characters, and W&B accepts {longest} at most"


def reason(error: Exception) -> str:
    """Return why W&B fails, in one line without the values of settings, which may be secret."""
    if isinstance(error, ValidationError):
        return "; ".join(detail["msg"].removeprefix("Value error, ") for detail in error.errors(include_input=False))
    return describe_os_error(error) if isinstance(error, OSError) else first_line(error)
