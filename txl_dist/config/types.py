"""The types of the config's values, with their limits; and what may change a value."""

import os
from enum import Enum, auto
from typing import Annotated, Literal, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainValidator, Strict
from pydantic_core import PydanticCustomError

SCHEMA = ConfigDict(extra="forbid", coerce_numbers_to_str=True)  # a folder may be named 2024

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
FLOAT32_MAX = 3.4e38


def listed(value: object) -> object:
    """Let a single text stand for a list of it."""
    return [value] if isinstance(value, str) else value


def listed_number(value: object) -> object:
    """Let a single number stand for a list of it."""
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


def checked_path(value: str) -> str:
    """Expand `~`; where no such user is known, it is the beginning of a name."""
    if not value.strip():
        raise PydanticCustomError("path", "is empty; give a path")
    if "\0" in value:
        raise PydanticCustomError("path", "holds a NUL character; give a path")
    path = os.path.expanduser(value)
    return os.path.abspath(path) if path.startswith("~") else path


def checked_run(path: str) -> str:
    """Refuse names that safetensors cannot open."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError(
            "run", "is not UTF-8, and safetensors opens no such file; give another name"
        ) from None
    return path


# Strict: "12" is not accepted as a number, nor 1 as true.
StrictBool = Annotated[bool, Strict()]
PositiveInt = Annotated[int, Strict(), Field(ge=1, le=INT64_MAX)]
NonNegativeInt = Annotated[int, Strict(), Field(ge=0, le=INT64_MAX)]
Size = Annotated[int, Strict(), Field(ge=1, le=INT32_MAX)]  # of a dimension of tensors
SizeOrZero = Annotated[int, Strict(), Field(ge=0, le=INT32_MAX)]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**64)]  # what torch takes
Port = Annotated[int, Strict(), Field(ge=0, le=65535)]  # 0: one that is free
Workers = Annotated[int, Strict(), Field(ge=1, le=1024)]
Positive = Annotated[float, Strict(), Field(gt=0, le=FLOAT32_MAX, allow_inf_nan=False)]
NonNegative = Annotated[float, Strict(), Field(ge=0, le=FLOAT32_MAX, allow_inf_nan=False)]
Fraction = Annotated[float, Strict(), Field(ge=0, lt=1, allow_inf_nan=False)]
Share = Annotated[float, Strict(), Field(gt=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Strict(), Field(gt=0, le=1e9, allow_inf_nan=False)]
StrList = Annotated[list[str], Field(min_length=1), BeforeValidator(listed)]
PathStr = Annotated[str, AfterValidator(checked_path)]  # or a URL, or a glob
PathList = Annotated[list[PathStr], Field(min_length=1), BeforeValidator(listed)]
RunDir = Annotated[PathStr, AfterValidator(checked_run)]
RunDirs = Annotated[list[RunDir], Field(min_length=1), BeforeValidator(listed)]


def step_or_best(value: object) -> object:
    """Accept a step, "best" or None."""
    if value is None or value == "best" or (type(value) is int and value >= 0):
        return value
    raise PydanticCustomError("which", "should be a step, best (the lowest loss on valid), or null (the latest)")


CheckpointChoice = Annotated[int | Literal["best"] | None, PlainValidator(step_or_best)]  # of a run's checkpoints


def true_false_or_auto(value: object) -> object:
    """Accept a boolean or "auto"."""
    if isinstance(value, bool) or value == "auto":
        return value
    raise PydanticCustomError("switch", "should be true, false or auto")


BoolOrAuto = Annotated[bool | Literal["auto"], PlainValidator(true_false_or_auto)]


# ----------------------------------------------------------------------------------------- what may change a value


class MayChange(Enum):
    """When a key may get another value than a run was started with; it stands beside the type of the key."""

    NEVER = auto()  # it is part of the run's identity: with another value weights or data would not fit
    EVALUATION = auto()  # where a trained model is read
    LANES = auto()  # there, and where a run is resumed with empty memories (run.on_lane_change)
    ALWAYS = auto()  # at every start


NEVER = MayChange.NEVER
EVALUATION = MayChange.EVALUATION
LANES = MayChange.LANES
ALWAYS = MayChange.ALWAYS


def may_change(section: type, unmarked: MayChange) -> dict[str, MayChange]:
    """Return for each key of a section what may change it; `unmarked` where its type does not say."""
    keys = {}
    for key, hint in get_type_hints(section, include_extras=True).items():
        marks = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, MayChange)]
        keys[key] = marks[0] if marks else unmarked
    return keys
