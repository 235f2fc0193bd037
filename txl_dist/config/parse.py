"""Parse a composed config into a job of schema.py, with all problems reported at once, in plain words."""

import difflib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from txl_dist.config import checks, run_checks
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
    parsed: dict[str, Any] = {}
    for name, kind in sections.items():
        may_be_null = type(None) in get_args(kind)  # such a key is never missing: there "???" is a text
        if name not in values or (values[name] == "???" and not may_be_null):
            problems.append(f"{name}: is missing; give {name}=...")
            continue
        try:
            parsed[field_of[name]] = TypeAdapter(kind).validate_python(values[name])
        except ValidationError as error:
            problems.extend(describe_wrong_values(name, kind, values[name], error))
    problems.extend(failed_checks(schema, parsed))
    if problems:
        raise ConfigError(problems)
    return schema(**parsed)


def failed_checks(schema: type, sections: dict[str, Any]) -> Iterator[str]:
    """Run the checks of a job whose sections could all be parsed: a wrong value elsewhere does not silence them."""
    for check in [*checks.CHECKS.get(schema, []), *run_checks.CHECKS.get(schema, [])]:
        names = inspect.signature(check).parameters
        if all(name in sections for name in names):
            yield from check(**{name: sections[name] for name in names})


def describe_wrong_values(section: str, kind: Any, value: Any, error: ValidationError) -> Iterator[str]:
    """Describe each problem that pydantic has found in a section, with its full key."""
    tag = value.get("name") if isinstance(value, dict) else None
    for detail in error.errors():
        # Where a group has several shapes pydantic names the shape first; it is not part of the key.
        path = [str(part) for part in detail["loc"]]
        if path[:1] == [tag]:
            path = path[1:]
        key = ".".join([section, *given_parts(value, path)])
        if detail["type"] == "unexpected_keyword_argument":
            yield describe_unknown_key(key, [f"{section}.{field}" for field in field_names(kind)])
        elif detail["type"] == "missing":
            yield f"{key}: is missing"
        elif detail["type"] == "too_short":
            yield f"{key}={detail['input']}: should have {detail['ctx']['min_length']} or more items"
        elif detail["type"] in ("dataclass_type", "union_tag_not_found"):
            keys = ", ".join(f"{key}.{field}" for field in sorted(field_names(kind)))
            yield f"{key}={detail['input']}: is a section, not a value; its keys are {keys}"
        elif detail["type"] == "union_tag_invalid":
            yield f"{key}.name={tag}: should be {detail['ctx']['expected_tags']}"
        else:
            given = "null" if detail["input"] is None else detail["input"]
            yield f"{key}={given}: {detail['msg'].replace('Input should', 'should')}"


def given_parts(value: Any, path: list[str]) -> Iterator[str]:
    """Yield the parts of a path that lead into `value`: a single value that stands for a list of it has no index."""
    for part in path:
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list):
            value = value[int(part)]
        else:
            return
        yield part


def describe_unknown_key(key: str, known: Iterable[str]) -> str:
    """Describe an unknown key, with the known key that is most like it."""
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"{key}: there is no such key" + (f"; did you mean {near[0]}?" if near else "")


def field_names(kind: Any) -> set[str]:
    """Return the field names of a dataclass, or of all dataclasses in an annotated union."""
    if hasattr(kind, "__dataclass_fields__"):
        return {field.name for field in fields(kind)}
    return {name for part in get_args(kind) for name in field_names(part)}
