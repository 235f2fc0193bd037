"""The checks of a training config across its sections, made before anything expensive starts.

A check yields problems. Its parameters are named after the sections that it looks at; parse.py calls it when those
could be parsed.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from importlib.util import find_spec
from math import lcm
from shutil import which
from typing import Any

from txl_dist.config.schema import (
    LANE_KEYS,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    LengthsConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainConfig,
    TrainJob,
)
from txl_dist.data.index import Index
from txl_dist.distributed.launcher import launcher_env
from txl_dist.errors import UserError
from txl_dist.files.parsing import shown
from txl_dist.tracking.weights_and_biases import refused_settings


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


def patterns_are_sound(optimizer: OptimizerConfig) -> Iterator[str]:
    for pattern in optimizer.lr_scale:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"optimizer.lr_scale: {pattern!r} is no regular expression ({error})"


def steps_are_in_order(train: TrainConfig, schedule: ScheduleConfig) -> Iterator[str]:
    if train.stop_at is not None and train.stop_at > train.max_steps:
        yield f"train.stop_at={train.stop_at}: is after train.max_steps={train.max_steps}"
    if schedule.warmup_steps > train.max_steps:
        yield f"schedule.warmup_steps={schedule.warmup_steps}: is after train.max_steps={train.max_steps}"


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


def rates_are_in_order(schedule: ScheduleConfig, optimizer: OptimizerConfig) -> Iterator[str]:
    if schedule.min_lr > optimizer.lr:
        yield f"schedule.min_lr={schedule.min_lr}: is above optimizer.lr={optimizer.lr}"


def run_dir_can_be_printed(run: RunConfig) -> Iterator[str]:
    """Its name stands in messages and in the commands that a run ends with."""
    if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in run.dir):
        yield f"run.dir={run.dir!r}: holds a line break or another control character; give a name without"


def tracking_is_accepted(tracking: TrackingConfig) -> Iterator[str]:
    if tracking.mode != "disabled":
        yield from refused_settings(tracking)


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


# Optimizers that keep the same states: one continues where the other has stopped.
KINDRED = {"adam": "adam", "adamw": "adam", "lamb": "lamb"}

# Keys of the model that may change: regularization, and those of the lanes, which run.on_lane_change covers.
MODEL_KEYS = [field.name for field in fields(ModelConfig)]
MAY_CHANGE = {key for key in MODEL_KEYS if key.startswith("drop")} | {"variational"}
MAY_CHANGE |= {key for section, key in LANE_KEYS if section == "model"}

# The identity of a run: with another value its weights, its memory or its position in the data would not fit.
IDENTITY = [
    ("run", "seed"),
    ("data", "order"),
    ("data", "reset_memory"),
    ("optimizer", "average_from"),
    *(("model", key) for key in sorted(MODEL_KEYS) if key not in MAY_CHANGE),
]


Check = Callable[..., Iterator[str]]
CHECKS: dict[type, list[Check]] = {
    TrainJob: [
        lanes_can_be_split,
        stages_can_be_cut,
        model_fits_together,
        evaluation_fits_together,
        engine_is_sound,
        patterns_are_sound,
        steps_are_in_order,
        checkpoints_can_be_kept,
        profile_is_of_training,
        rates_are_in_order,
        run_dir_can_be_printed,
        tracking_is_accepted,
        data_are_there,
        run_continues_itself,
        skipped_steps_can_be_read,
    ],
}
