"""Parse a composed config into a job of schema.py, with all problems reported at once, in plain words."""

import inspect
from collections.abc import Iterator
from typing import Any, TypeVar, get_args, get_type_hints

from txl_dist.config import checks, run_checks
from txl_dist.config.initial_model import resolve_model
from txl_dist.config.schema import PlanJob
from txl_dist.config.sections import describe_unknown_key, parse_section
from txl_dist.distributed.launcher import launcher_env
from txl_dist.errors import ConfigError

Job = TypeVar("Job")


def parse_config(schema: type[Job], values: Any) -> Job:
    """Turn a composed config (nested dicts) into the dataclass `schema`.

    Sections are parsed one by one, so that a mistake in one hides no mistake in another.

    Raises:
        ConfigError: with every unknown key, missing key, wrong value and failed check.
    """
    # A key that is a word of Python, such as `from`, is a field with `_` behind it.
    field_of = {field.removesuffix("_"): field for field in get_type_hints(schema)}
    sections = {field.removesuffix("_"): kind for field, kind in get_type_hints(schema, include_extras=True).items()}
    problems = [describe_unknown_key(str(key), sections) for key in values if key not in sections]
    try:
        values = resolve_model(values)
    except ConfigError as error:
        problems.extend(error.problems)
        sections.pop("model")
    parsed: dict[str, Any] = {}
    for name, kind in sections.items():
        may_be_null = type(None) in get_args(kind)  # such a key is never missing: there "???" is a text
        if name not in values or (values[name] == "???" and not may_be_null):
            problems.append(f"{name}: is missing; give {name}=...")
            continue
        try:
            parsed[field_of[name]] = parse_section(name, kind, values[name])
        except ConfigError as error:
            problems.extend(error.problems)
    problems.extend(failed_checks(schema, parsed))
    if problems:
        raise ConfigError(problems)
    return schema(**parsed)


def failed_checks(schema: type, sections: dict[str, Any]) -> Iterator[str]:
    """Run the checks of a job whose sections could all be parsed: a wrong value elsewhere does not silence them."""
    known = sections | hardware(schema, sections)
    for check in [*checks.CHECKS.get(schema, []), *run_checks.CHECKS.get(schema, [])]:
        names = inspect.signature(check).parameters
        if all(name in known for name in names):
            yield from check(**{name: known[name] for name in names})


def hardware(schema: type, sections: dict[str, Any]) -> dict[str, checks.Hardware]:
    """Return what a job is checked against, as a section: this host's, or what a plan names where that is right."""
    if schema is not PlanJob:
        return {"hardware": checks.Hardware(launcher_env().size)}
    if not {"nodes", "gpus", "device"} <= sections.keys():
        return {}
    return {"hardware": checks.Hardware(sections["nodes"] * sections["gpus"], sections["device"])}
