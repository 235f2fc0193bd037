"""Parse single sections of a config, and describe what is wrong with them in plain words."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from txl_dist.errors import ConfigError
from txl_dist.files.parsing import shown
from txl_dist.models import registry
from txl_dist.models.config import ModelConfig


def parse_section(name: str, kind: Any, value: Any) -> Any:
    """Turn the values of a section into the type `kind`.

    Raises:
        ConfigError: with every unknown key, missing key and wrong value.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ConfigError(list(describe_wrong_values(name, kind, value, error))) from error


def parse_model(value: Any) -> ModelConfig:
    """Parse the section of a model, whose key `name` chooses the architecture; one that is parsed already stays.

    Raises:
        ConfigError: with every problem.
    """
    if isinstance(value, ModelConfig):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError([f"model={value}: is a section, not a value; model.name is the architecture"])
    name = value.get("name")
    if not isinstance(name, str):
        raise ConfigError([f"model.name={shown(name)}: should be one of {', '.join(registry.names())}"])
    try:
        kind = registry.find(name).Config
    except LookupError as error:
        raise ConfigError([f"model.name={name}: {error.args[0]}"]) from error
    config: ModelConfig = parse_section("model", kind, value)
    return config


AnyModel = Annotated[ModelConfig, BeforeValidator(parse_model)]


def changed_model(config: ModelConfig, changes: Mapping[str, Any], section: str = "model") -> ModelConfig:
    """Return a trained model's config with the values that a reading of it chooses; null is no choice.

    Args:
        section: where they are given.

    Raises:
        ConfigError: where a key is not one that may change there, or a value is wrong or does not fit the others.
    """
    allowed = config.read_otherwise()
    problems = []
    for key, value in changes.items():
        if key not in config.may_change():
            problems.append(describe_unknown_key(f"{section}.{key}", [f"{section}.{known}" for known in allowed]))
        elif key not in allowed and value is not None:
            problems.append(f"{section}.{key}: is fixed by the training; what may differ is {', '.join(allowed)}")
    chosen = {key: changes[key] for key in allowed if changes.get(key) is not None}
    changed = config
    try:
        changed = parse_section(section, type(config), asdict(config) | chosen)
    except ConfigError as error:
        problems += error.problems
    if changed != config:
        problems += changed.problems(section)
    if problems:
        raise ConfigError(problems)
    return changed


def describe_wrong_values(section: str, kind: Any, value: Any, error: ValidationError) -> Iterator[str]:
    """Describe each problem that pydantic has found in a section, with its full key."""
    tag = value.get("name") if isinstance(value, dict) else None
    for detail in error.errors():
        # Where a group has several shapes pydantic names the shape first; it is not part of the key.
        path = [str(part) for part in detail["loc"]]
        if path[:1] == [tag]:
            path = path[1:]
        key = ".".join([section, *given_parts(value, path)])
        if detail["type"] == "unexpected_keyword_argument" and key.rpartition(".")[2] in field_names(kind):
            yield f"{key}: is not a key of {section}.name={tag}"  # but of another shape of this section
        elif detail["type"] == "unexpected_keyword_argument":
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
    by_last_part = {other.rpartition(".")[2]: other for other in known}
    near = difflib.get_close_matches(key.rpartition(".")[2], list(by_last_part), n=1)
    return f"{key}: there is no such key" + (f"; did you mean {by_last_part[near[0]]}?" if near else "")


def field_names(kind: Any) -> set[str]:
    """Return the field names of a dataclass, or of all dataclasses in an annotated union."""
    if hasattr(kind, "__dataclass_fields__"):
        return {field.name for field in fields(kind)}
    return {name for part in get_args(kind) for name in field_names(part)}
