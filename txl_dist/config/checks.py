"""Reads a composed config, and checks all of it before anything expensive starts.

`read` turns nested values into one of the jobs of config.py, and reports *all* problems at once, in plain words,
each with its key.
"""

import difflib
import inspect
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from importlib.util import find_spec
from itertools import chain
from math import lcm
from pathlib import Path
from shutil import which
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from txl_dist.config.schema import (
    LANE_KEYS,
    CheckpointChoice,
    CheckpointConfig,
    ConvertedModelConfig,
    ConvertJob,
    DataConfig,
    EngineConfig,
    EvaluateJob,
    GenerateJob,
    InspectJob,
    LengthsConfig,
    ModelConfig,
    OptimizerConfig,
    ReclJob,
    RunConfig,
    ScheduleConfig,
    ScoreJob,
    TrackingConfig,
    TrainConfig,
    TrainJob,
)
from txl_dist.data.index import Index
from txl_dist.distributed.launcher import launcher_env
from txl_dist.errors import ConfigError, UserError
from txl_dist.files.parsing import shown
from txl_dist.tracking.weights_and_biases import refused_settings

Job = TypeVar("Job")


def parse_config(schema: type[Job], values: Any) -> Job:
    """Turn a composed config (nested dicts) into the dataclass `schema`.

    Sections are read one by one, so that a mistake in one hides no mistake in another.

    Raises:
        ConfigError: with every unknown key, missing key, wrong value and failed check.
    """
    # A key that is a word of Python's, as `from`, is a field with `_` behind it.
    fields_of = {field.removesuffix("_"): field for field in get_type_hints(schema)}
    sections = {field.removesuffix("_"): kind for field, kind in get_type_hints(schema, include_extras=True).items()}
    problems = [unknown_key(str(key), sections) for key in values if key not in sections]
    found: dict[str, Any] = {}
    for name, kind in sections.items():
        may_be_null = type(None) in get_args(kind)  # such a key is never missing: there "???" is a text
        if name not in values or (values[name] == "???" and not may_be_null):
            problems.append(f"{name}: is missing; give {name}=...")
            continue
        try:
            found[fields_of[name]] = TypeAdapter(kind).validate_python(values[name])
        except ValidationError as error:
            problems.extend(plain_words(name, kind, values[name], error))
    problems.extend(failed_checks(schema, found))
    if problems:
        raise ConfigError(problems)
    return schema(**found)


def plain_words(section: str, kind: Any, value: Any, error: ValidationError) -> Iterator[str]:
    tag = value.get("name") if isinstance(value, dict) else None
    for detail in error.errors():
        # Of a group with several shapes pydantic names the shape too; a user's key does not hold it.
        path = [str(part) for i, part in enumerate(detail["loc"]) if not (i == 0 and part == tag)]
        key = ".".join([section, *given_parts(value, path)])
        if detail["type"] == "unexpected_keyword_argument":
            yield unknown_key(key, [f"{section}.{field}" for field in field_names(kind)])
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


def field_names(kind: Any) -> set[str]:
    """Field names of a dataclass, or of all the dataclasses that an annotated union offers."""
    if hasattr(kind, "__dataclass_fields__"):
        return {field.name for field in fields(kind)}
    return {name for part in get_args(kind) for name in field_names(part)}


def unknown_key(key: str, known: Any) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"{key}: there is no such key" + (f"; did you mean {near[0]}?" if near else "")


# ------------------------------------------------------------------------------------------------------- checks

Check = Callable[..., Iterator[str]]
CHECKS: dict[type, list[Check]] = defaultdict(list)


def check(*jobs: type) -> Callable[[Check], Check]:
    """Register a check of these jobs. Its parameters bear the names of the sections that it looks at, and it runs when
    those could be read: so a wrong type in one section does not silence the checks of the others."""

    def register(function: Check) -> Check:
        for job in jobs:
            CHECKS[job].append(function)
        return function

    return register


def failed_checks(schema: type, found: dict[str, Any]) -> Iterator[str]:
    for function in CHECKS[schema]:
        wanted = inspect.signature(function).parameters
        if all(name in found for name in wanted):
            yield from function(**{name: found[name] for name in wanted})


@check(TrainJob)
def lanes_can_be_split(data: DataConfig, engine: EngineConfig) -> Iterator[str]:
    processes = launcher_env().size
    if processes % engine.pipeline_stages:
        return  # told by stages_can_be_cut
    data_parallel = processes // engine.pipeline_stages
    parts = data_parallel * engine.gradient_accumulation
    if data.num_lanes % parts:
        below = data.num_lanes // parts * parts
        works = ", ".join(str(n) for n in (below - parts, below, below + parts, below + 2 * parts) if n > 0)
        over = f"{data_parallel} processes" if engine.pipeline_stages == 1 else f"{data_parallel} pipelines"
        yield (
            f"data.num_lanes={data.num_lanes}: cannot be split evenly over {over} x "
            f"{engine.gradient_accumulation} micro-batches (engine.gradient_accumulation); what works: {works}, ..."
        )


@check(TrainJob)
def stages_can_be_cut(engine: EngineConfig, model: ModelConfig) -> Iterator[str]:
    processes, stages, layers = launcher_env().size, engine.pipeline_stages, engine.stage_layers
    if processes % stages:
        yield (
            f"engine.pipeline_stages={stages}: needs a multiple of as many processes, not {processes}; "
            f"start with torchrun --nproc_per_node={stages}"
        )
    if stages > model.n_layer + 2:
        yield f"engine.pipeline_stages={stages}: more than an embedding, {model.n_layer} layers and a softmax"
    if layers is None:
        return
    given = f"engine.stage_layers={layers}"
    if len(layers) != stages:
        yield f"{given}: must have one entry for each of engine.pipeline_stages={stages}"
    if sum(layers) != model.n_layer:
        yield f"{given}: must add up to model.n_layer={model.n_layer}, not {sum(layers)}"
    if 0 in layers[1:-1]:
        yield f"{given}: only the first stage (embedding) and the last (softmax) can do without a layer"


@check(TrainJob)
def model_fits_together(model: ModelConfig) -> Iterator[str]:
    yield from lengths_fit_together("model", model)
    if sorted(set(model.cutoffs)) != model.cutoffs:
        yield f"model.cutoffs={shown(model.cutoffs)}: must increase"
    if model.div_val > 1 and not model.cutoffs:
        yield f"model.div_val={model.div_val}: narrows the embeddings of clusters, but model.cutoffs is empty"
    width = model.d_model
    for _ in model.cutoffs:
        width //= model.div_val
    if width < 1:
        yield (
            f"model.div_val={model.div_val}: leaves no dimension for cluster {len(model.cutoffs)} "
            f"of model.d_model={model.d_model}"
        )


@check(TrainJob)
def evaluation_fits_together(model: ModelConfig, evaluation: LengthsConfig) -> Iterator[str]:
    if evaluation.of(model) != model:
        yield from lengths_fit_together("evaluation", evaluation.of(model))


def lengths_fit_together(section: str, model: ModelConfig) -> Iterator[str]:
    if model.clamp_len == 0:
        yield f"{section}.clamp_len=0: would make all distances alike; give -1 (no clamping) or a distance of 1 or more"
    if model.same_length and model.mem_len == 0:
        yield (
            f"{section}.same_length=true: every token attends to mem_len tokens, but {section}.mem_len=0; give a memory"
        )


@check(TrainJob)
def engine_is_sound(engine: EngineConfig, optimizer: OptimizerConfig) -> Iterator[str]:
    """Refuses what DeepSpeed accepts and gets wrong, each with the reason."""
    import torch  # seconds to import, and `prepare` never needs it

    stage, gpu = engine.zero_stage, torch.cuda.is_available()
    if engine.precision == "fp16" and not gpu:
        yield "engine.precision=fp16: needs a GPU; on CPU use fp32 or bf16"
    if engine.precision == "bf16" and gpu and not torch.cuda.is_bf16_supported():
        yield "engine.precision=bf16: this GPU has no bf16; use fp16 or fp32"
    if engine.attention == "triton" and not (gpu and find_spec("triton")):
        yield "engine.attention=triton: needs a GPU and the package triton; use engine.attention=auto"
    if engine.compile and stage == 3:
        yield "engine.compile=true: ZeRO 3 takes the weights away between uses, and each return would be compiled anew"
    elif engine.compile and not any(map(which, (os.environ.get("CXX", "g++"), "clang++"))):
        yield "engine.compile=true: needs a C++ compiler, and there is no g++; install one, or leave it out"
    if stage == 0 and (engine.precision in ("bf16", "fp16") or (engine.precision == "auto" and gpu)):
        yield (
            f"engine.zero_stage=0: with engine.precision={engine.precision} DeepSpeed's first step and its loss scale "
            "are wrong; use engine.zero_stage=1, or engine.precision=fp32"
        )
    if engine.pipeline_stages > 1 and stage > 1:
        yield (
            f"engine.zero_stage={stage}: DeepSpeed's pipeline knows ZeRO 0 and 1 only; "
            "use engine.zero_stage=1, or engine.pipeline_stages=1"
        )
    if engine.offload == "optimizer" and stage == 0:
        yield "engine.offload=optimizer: needs engine.zero_stage of 1, 2 or 3"
    if engine.offload == "parameters" and stage != 3:
        yield f"engine.offload=parameters: needs engine.zero_stage=3, not {stage}"
    if optimizer.name == "lamb" and stage > 0:
        yield (
            f"optimizer.name=lamb: scales each parameter by its own norm, which ZeRO {stage} cuts in pieces; "
            "use engine.zero_stage=0 with engine.precision=fp32"
        )


@check(TrainJob)
def patterns_are_sound(optimizer: OptimizerConfig) -> Iterator[str]:
    for pattern in optimizer.lr_scale:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"optimizer.lr_scale: {pattern!r} is no regular expression ({error})"


@check(TrainJob)
def steps_are_in_order(train: TrainConfig, schedule: ScheduleConfig) -> Iterator[str]:
    if train.stop_at is not None and train.stop_at > train.max_steps:
        yield f"train.stop_at={train.stop_at}: is after train.max_steps={train.max_steps}"
    if schedule.warmup_steps > train.max_steps:
        yield f"schedule.warmup_steps={schedule.warmup_steps}: is after train.max_steps={train.max_steps}"


@check(TrainJob)
def checkpoints_can_be_kept(checkpoint: CheckpointConfig, train: TrainConfig) -> Iterator[str]:
    every, keep_every = checkpoint.every, checkpoint.keep_every
    if keep_every and keep_every % every:
        yield f"checkpoint.keep_every={keep_every}: must be a multiple of checkpoint.every={every}"
    if checkpoint.keep_best and (both := lcm(every, train.eval_every)) >= train.max_steps > max(
        every, train.eval_every
    ):
        yield (
            f"checkpoint.keep_best=true: only what is evaluated at its very step can be the best, but "
            f"checkpoint.every={every} and train.eval_every={train.eval_every} first meet at step {both}, and "
            f"train.max_steps={train.max_steps}; make one a multiple of the other"
        )


@check(TrainJob)
def profile_is_of_training(train: TrainConfig, checkpoint: CheckpointConfig) -> Iterator[str]:
    if train.profile is None:
        return
    (first, last), given = train.profile, f"train.profile={train.profile}"
    if first > last:
        yield f"{given}: ends before it begins; give the first step, then the last"
    for key, end in (("stop_at", train.stop_at), ("max_steps", train.max_steps)):
        if end is not None and last > end:
            yield f"{given}: ends after train.{key}={end}"
    for key, every in (("train.eval_every", train.eval_every), ("checkpoint.every", checkpoint.every)):
        if (pause := -(-first // every) * every) < last:
            yield (
                f"{given}: after step {pause} training pauses ({key}={every}), and the profile would be of that, "
                f"too; end with step {pause} or begin after it"
            )


@check(TrainJob)
def rates_are_in_order(schedule: ScheduleConfig, optimizer: OptimizerConfig) -> Iterator[str]:
    if schedule.min_lr > optimizer.lr:
        yield f"schedule.min_lr={schedule.min_lr}: is above optimizer.lr={optimizer.lr}"


@check(TrainJob)
def run_dir_can_be_printed(run: RunConfig) -> Iterator[str]:
    """Its name stands in messages and in the commands that a run ends with."""
    if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in run.dir):
        yield f"run.dir={run.dir!r}: holds a line break or another control character; give a name without"


@check(TrainJob)
def tracking_is_accepted(tracking: TrackingConfig) -> Iterator[str]:
    if tracking.mode != "disabled":
        yield from refused_settings(tracking)


@check(TrainJob)
def data_are_there(data: DataConfig, model: ModelConfig, checkpoint: CheckpointConfig) -> Iterator[str]:
    try:
        index = Index.open(data.dir)
        index.tokenizer()
    except UserError as error:
        yield f"data.dir={error}"  # which begins with the place
        return
    if data.on_error == "fail" and (errors := index.validate()):
        more = f" ({len(errors) - 3} more shards likewise)" if len(errors) > 3 else ""
        yield from (f"data.dir={each}" for each in [*errors[:2], *(each + more for each in errors[2:3])])
    if "train" not in index.splits:
        yield f"data.dir={data.dir}: has no training split, only {', '.join(index.splits)}"
    for name, split in index.splits.items():
        if split.tokens < data.num_lanes:
            yield f"data.num_lanes={data.num_lanes}: more lanes than the split {name} has tokens ({split.tokens:,})"
    if checkpoint.keep_best and "valid" not in index.splits:
        yield f"checkpoint.keep_best=true: {data.dir} has no valid split to find the best by"
    if model.cutoffs and model.cutoffs[-1] >= index.vocab_size:
        yield f"model.cutoffs={model.cutoffs}: must stay below the vocabulary of {index.vocab_size:,} in {data.dir}"


@check(TrainJob)
def run_continues_itself(
    run: RunConfig, data: DataConfig, model: ModelConfig, optimizer: OptimizerConfig
) -> Iterator[str]:
    """A run directory with a checkpoint goes on only as the run that it is."""
    from txl_dist.checkpoint.format import latest

    try:
        checkpoint = latest(run.dir)
    except UserError as error:
        yield from str(error).splitlines()
        return
    if checkpoint is None:
        return
    if "imported" in checkpoint.state:
        yield (
            f"run.dir={run.dir}: holds a model imported from {checkpoint.state['imported']['from']}, without optimizer "
            "and memory to go on with; give another run.dir"
        )
        return
    yield from continues(checkpoint.config, run, data, model, optimizer)


@check(TrainJob)
def skipped_steps_can_be_read(run: RunConfig) -> Iterator[str]:
    from txl_dist.engine.skipped_steps import read_skipped_steps

    try:
        read_skipped_steps(run.dir)
    except UserError as error:
        yield str(error)


def continues(
    started: Mapping[str, Any], run: RunConfig, data: DataConfig, model: ModelConfig, optimizer: OptimizerConfig
) -> Iterator[str]:
    """What a config must not change of the one, `started`, that a checkpoint was made with."""
    given = {"run": asdict(run), "data": asdict(data), "model": asdict(model), "optimizer": asdict(optimizer)}
    trained_by = started["optimizer"]["name"]
    if KINDRED[trained_by] != KINDRED[optimizer.name]:
        yield (
            f"optimizer.name={optimizer.name}: the run in {run.dir} was trained with {trained_by}, whose states are of "
            f"another kind; give optimizer={trained_by}, or another run.dir for another run"
        )
    for section, key in [*IDENTITY, *LANE_KEYS]:
        now = given[section][key]
        before = started[section].get(key, now)
        if before == now:
            continue
        told = f"{section}.{key}={now}: the run in {run.dir} was started with {before}"
        if (section, key) in IDENTITY:
            yield f"{told}; give that, or another run.dir for another run"
        elif run.on_lane_change == "refuse":
            yield (
                f"{told}, and what it remembers is of those lanes, at their places in the data; give that, or "
                "run.on_lane_change=reset_memory to go on from the same share of the epoch with empty memories, "
                "or another run.dir for another run"
            )


# Optimizers that keep the same states: one goes on where the other has stopped.
KINDRED = {"adam": "adam", "adamw": "adam", "lamb": "lamb"}

MAY_CHANGE = {name for name in field_names(ModelConfig) if name.startswith("drop")} | {"variational"}
MAY_CHANGE |= {key for section, key in LANE_KEYS if section == "model"}

# What makes a run that run: with another value here its weights, its memory or its place in the data would not fit.
IDENTITY = [
    ("run", "seed"),
    ("data", "order"),
    ("data", "reset_memory"),
    ("optimizer", "average_from"),
    *(("model", name) for name in sorted(field_names(ModelConfig)) if name not in MAY_CHANGE),
]


@check(GenerateJob, InspectJob, ScoreJob)
def run_is_there(run: str, checkpoint: CheckpointChoice) -> Iterator[str]:
    yield from run_problems(run, checkpoint)


@check(EvaluateJob)
def a_run_is_there(run: list[str], checkpoint: CheckpointChoice) -> Iterator[str]:
    """Refuse runs of which none can be evaluated; where some can, the rows of the others say why not."""
    yield from globs_match(run)
    problems = [list(run_problems(path, checkpoint)) for path in run_dirs(run)]
    if all(problems):
        yield from chain(*problems)


@check(ReclJob)
def runs_are_there(run: list[str]) -> Iterator[str]:
    yield from globs_match(run)
    for path in run_dirs(run):
        yield from run_problems(path, None)


@check(ReclJob)
def there_are_two_contexts(step: int, max_context: int) -> Iterator[str]:
    if max_context < 2 * step:
        yield f"max_context={max_context}: must be at least two steps of {step}, to compare a context with a longer one"


def globs_match(patterns: list[str]) -> Iterator[str]:
    for pattern in patterns:
        if not run_dirs([pattern]):
            yield f"run={pattern}: matches no run directory with a checkpoint"


def run_dirs(patterns: list[str]) -> list[str]:
    from txl_dist.checkpoint import format as checkpoint  # torch: seconds to import, and `prepare` never needs it

    return checkpoint.run_dirs(patterns)


def run_problems(path: str, which: CheckpointChoice) -> Iterator[str]:
    """Say why a run's checkpoint cannot be read."""
    from txl_dist.checkpoint.format import best, latest, steps

    if not Path(path).is_dir():
        hint = "; a list is given as run=[one,other]" if "," in path else ""
        yield f"run={path}: there is no such run directory{hint}"
    elif not steps(path):
        yield f"run={path}: holds no checkpoint"
    elif isinstance(which, int):
        if which not in steps(path):
            yield f"checkpoint={which}: {path} has checkpoints of steps {', '.join(map(str, steps(path)))}"
    else:
        try:
            latest(path)
        except UserError as error:
            yield from str(error).splitlines()
        else:
            if which == "best" and best(path) is None:
                yield (
                    f"checkpoint=best: no checkpoint of {path} was evaluated on valid at its very step; "
                    "leave it out for the newest"
                )


@check(ConvertJob)
def conversion_has_one_direction(
    run: str, from_: str | None, to: str | None, tokenizer_from: str | None, model: ConvertedModelConfig
) -> Iterator[str]:
    if (from_ is None) == (to is None):
        yield "from, to: give one of them: from=PATH imports a model as the run, to=FOLDER exports the run"
        return
    key, target = ("run", run) if from_ else ("to", to)
    if (place := Path(str(target))).exists() and not (place.is_dir() and not any(place.iterdir())):
        yield f"{key}={target}: is there already, and nothing is overwritten; give another folder"
    if from_ is not None and not Path(from_).exists():
        yield f"from={from_}: there is no such file or folder"
    if to is not None:
        given = {"tokenizer_from": tokenizer_from, "model.cutoffs": model.cutoffs, "model.pre_lnorm": model.pre_lnorm}
        yield from (
            f"{key}={value}: is for from=PATH; a run knows its own" for key, value in given.items() if value is not None
        )


@check(ConvertJob)
def exported_run_is_there(run: str, to: str | None, checkpoint: CheckpointChoice) -> Iterator[str]:
    if to is not None:
        yield from run_problems(run, checkpoint)


@check(EvaluateJob)
def a_window_has_no_memory(sliding_window: bool, model: LengthsConfig) -> Iterator[str]:
    if sliding_window and model.mem_len is not None:
        yield f"model.mem_len={model.mem_len}: a sliding window reads without memory; its length is model.tgt_len"
