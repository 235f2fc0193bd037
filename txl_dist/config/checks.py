"""The checks of a training config across its sections, made before anything expensive starts.

A check yields problems. Its parameters are named after the sections that it looks at; parse.py calls it when those
could be parsed.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import gcd, lcm
from shutil import which

from txl_dist.config.identity import refused_changes
from txl_dist.config.schema import (
    AssumeConfig,
    CausalLMConfig,
    CheckpointConfig,
    CorpusConfig,
    DataConfig,
    DuplicationCorpusConfig,
    EngineConfig,
    ExamplesCorpusConfig,
    FilesCorpusConfig,
    IdsTokenizerConfig,
    ModelChanges,
    ObjectiveConfig,
    OptimizerConfig,
    PermutationLMConfig,
    PlanJob,
    PrepareJob,
    RunConfig,
    ScheduleConfig,
    TokenizerConfig,
    TokensCorpusConfig,
    TrackingConfig,
    TrainConfig,
    TrainJob,
    ids_of,
    reuse_len_of,
)
from txl_dist.config.sections import changed_model
from txl_dist.config.task_checks import language_model_is_planned, task_fits_the_rest, task_has_its_data
from txl_dist.data.index import Index
from txl_dist.data.two_way import CLASSIFIER, SEPARATOR
from txl_dist.errors import ConfigError, UserError
from txl_dist.evaluation.encode import encode_text
from txl_dist.models.config import ModelConfig
from txl_dist.tracking.services.wandb_settings import refused_settings


@dataclass(frozen=True)
class Hardware:
    """What a run is checked against.

    Attributes:
        processes: as many as the run has.
        device: which a plan names, such as H100 or cpu; None: what this host has.
    """

    processes: int
    device: str | None = None

    @property
    def is_here(self) -> bool:
        """Return whether the run is to start on this host."""
        return self.device is None

    @property
    def has_gpu(self) -> bool:
        """Return whether the processes have GPUs."""
        if self.device is not None:
            return self.device != "cpu"
        import torch  # seconds to import, and only training needs it

        return torch.cuda.is_available()


def lanes_can_be_split(data: DataConfig, engine: EngineConfig, hardware: Hardware) -> Iterator[str]:
    """Check that all pipelines get the same number of lanes, in equal micro-batches."""
    processes = hardware.processes
    if processes % engine.pipeline_stages:
        return  # stages_can_be_cut reports it
    pipelines = processes // engine.pipeline_stages
    parts = pipelines * engine.gradient_accumulation
    if data.num_lanes % parts:
        below = data.num_lanes // parts * parts
        multiples = [below - parts, below, below + parts, below + 2 * parts]
        valid = ", ".join(str(lanes) for lanes in multiples if lanes > 0)
        split = f"{pipelines} processes" if engine.pipeline_stages == 1 else f"{pipelines} pipelines"
        yield (
            f"data.num_lanes={data.num_lanes}: cannot be split evenly over {split} x "
            f"{engine.gradient_accumulation} micro-batches (engine.gradient_accumulation); give {valid}, ..."
        )


def stages_can_be_cut(engine: EngineConfig, model: ModelConfig, hardware: Hardware) -> Iterator[str]:
    """Check that the processes form whole pipelines, and that each stage gets something to compute."""
    processes = hardware.processes
    stages = engine.pipeline_stages
    layers = engine.stage_layers
    if processes % stages:
        yield (
            f"engine.pipeline_stages={stages}: needs a multiple of {stages} processes, not {processes}; "
            f"start with torchrun --nproc_per_node={stages}"
        )
    if stages > model.n_layer + 2:
        yield (
            f"engine.pipeline_stages={stages}: is more than the embedding, {model.n_layer} layers (model.n_layer) and "
            f"the softmax; give at most {model.n_layer + 2}"
        )
    if layers is None:
        return
    given = f"engine.stage_layers={layers}"
    if len(layers) != stages:
        yield f"{given}: must have one entry for each of engine.pipeline_stages={stages}"
    if sum(layers) != model.n_layer:
        yield f"{given}: must add up to model.n_layer={model.n_layer}, not {sum(layers)}"
    if 0 in layers[1:-1]:
        yield f"{given}: only the first stage (embedding) and the last (softmax) can be without layers"


def model_fits_together(model: ModelConfig) -> Iterator[str]:
    """Check the hyper-parameters against each other."""
    yield from model.problems()


def evaluation_fits_together(model: ModelConfig, evaluation: ModelChanges) -> Iterator[str]:
    """Check what evaluation reads otherwise than training."""
    try:
        changed_model(model, evaluation, "evaluation")
    except ConfigError as error:
        yield from error.problems


def attention_can_be_computed(engine: EngineConfig, model: ModelConfig) -> Iterator[str]:
    """Check that the model has the attention backend that is asked for."""
    backends = ("auto", *model.attention_backends)
    if engine.attention not in backends:
        yield f"engine.attention={engine.attention}: model.name={model.name} has only {', '.join(backends)}"


def engine_is_sound(engine: EngineConfig, optimizer: OptimizerConfig, hardware: Hardware) -> Iterator[str]:
    """Refuse what DeepSpeed accepts and gets wrong, each with the reason."""
    yield from device_has_what_is_needed(engine, hardware)
    stage = engine.zero_stage
    if engine.pipeline_stages > 1 and stage > 1:
        yield (
            f"engine.zero_stage={stage}: DeepSpeed's pipeline supports ZeRO 0 and 1 only; "
            "use engine.zero_stage=1, or engine.pipeline_stages=1"
        )
    if engine.offload == "optimizer" and stage == 0:
        yield "engine.offload=optimizer: needs engine.zero_stage of 1, 2 or 3, not 0"
    if engine.offload == "parameters" and stage != 3:
        yield f"engine.offload=parameters: needs engine.zero_stage=3, not {stage}"
    if optimizer.name == "lamb" and stage > 0:
        yield (
            f"optimizer.name=lamb: scales each parameter by its own norm, but ZeRO {stage} cuts parameters in pieces; "
            "use engine.zero_stage=0 with engine.precision=fp32"
        )


def device_has_what_is_needed(engine: EngineConfig, hardware: Hardware) -> Iterator[str]:
    """Check precision, attention backend and compilation against the GPU and the packages of this host."""
    stage = engine.zero_stage
    gpu = hardware.has_gpu
    if engine.precision == "fp16" and not gpu:
        yield "engine.precision=fp16: needs a GPU; on CPU use fp32 or bf16"
    if engine.precision == "bf16" and gpu and hardware.is_here and not gpu_has_bf16():
        yield "engine.precision=bf16: this GPU has no bf16; use fp16 or fp32"
    if engine.attention == "triton" and not (gpu and (find_spec("triton") or not hardware.is_here)):
        yield "engine.attention=triton: needs a GPU and the package triton; use engine.attention=auto"
    if engine.compile is True and stage == 3:
        yield (
            "engine.compile=true: ZeRO 3 removes the weights between uses, and each return would be compiled anew; "
            "use engine.zero_stage of 0, 1 or 2, or engine.compile=false"
        )
    elif engine.compile is True and hardware.is_here and not any(map(which, (os.environ.get("CXX", "g++"), "clang++"))):
        yield "engine.compile=true: needs a C++ compiler, and there is no g++; install one, or give false"
    if stage == 0 and (engine.precision in ("bf16", "fp16") or (engine.precision == "auto" and gpu)):
        yield (
            f"engine.zero_stage=0: with engine.precision={engine.precision} DeepSpeed's first step and its loss scale "
            "are wrong; use engine.zero_stage=1, or engine.precision=fp32"
        )


def gpu_has_bf16() -> bool:
    import torch

    return torch.cuda.is_bf16_supported()


def patterns_are_sound(optimizer: OptimizerConfig) -> Iterator[str]:
    """Check that the keys of lr_scale are regular expressions."""
    for pattern in optimizer.lr_scale:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"optimizer.lr_scale: {pattern!r} is not a regular expression ({error})"


def steps_are_in_order(train: TrainConfig, schedule: ScheduleConfig) -> Iterator[str]:
    """Check that nothing is planned for steps after the last one."""
    if train.stop_at is not None and train.stop_at > train.max_steps:
        yield f"train.stop_at={train.stop_at}: is after train.max_steps={train.max_steps}"
    if schedule.warmup_steps > train.max_steps:
        yield f"schedule.warmup_steps={schedule.warmup_steps}: is after train.max_steps={train.max_steps}"


def checkpoints_can_be_kept(checkpoint: CheckpointConfig, train: TrainConfig) -> Iterator[str]:
    """Check that some checkpoint is written at a multiple of keep_every, and some after an evaluation."""
    every = checkpoint.every
    keep_every = checkpoint.keep_every
    if keep_every and keep_every % every:
        yield f"checkpoint.keep_every={keep_every}: must be a multiple of checkpoint.every={every}"
    both = lcm(every, train.eval_every)
    if checkpoint.keep_best and both >= train.max_steps > max(every, train.eval_every):
        yield (
            f"checkpoint.keep_best=true: only a checkpoint that is evaluated at its own step can be the best, but "
            f"checkpoint.every={every} and train.eval_every={train.eval_every} first meet at step {both}, and "
            f"train.max_steps={train.max_steps}; make one a multiple of the other"
        )


def profile_is_of_training(train: TrainConfig, checkpoint: CheckpointConfig) -> Iterator[str]:
    """Check that the profiled steps are trained, without an evaluation or a checkpoint between them."""
    if train.profile is None:
        return
    first, last = train.profile
    given = f"train.profile={train.profile}"
    if first > last:
        yield f"{given}: ends before it begins; give the first step, then the last"
    for key, end in (("stop_at", train.stop_at), ("max_steps", train.max_steps)):
        if end is not None and last > end:
            yield f"{given}: ends after train.{key}={end}"
    for key, every in (("train.eval_every", train.eval_every), ("checkpoint.every", checkpoint.every)):
        pause = -(-first // every) * every  # the first multiple of `every` from `first` on
        if pause < last:
            yield (
                f"{given}: after step {pause} training pauses ({key}={every}), and the profile would include the "
                f"pause; end with step {pause} or begin after it"
            )


def rates_are_in_order(schedule: ScheduleConfig, optimizer: OptimizerConfig) -> Iterator[str]:
    """Check that the learning rate decays downwards."""
    if schedule.min_lr > optimizer.lr:
        yield f"schedule.min_lr={schedule.min_lr}: is above optimizer.lr={optimizer.lr}"


def run_dir_can_be_printed(run: RunConfig) -> Iterator[str]:
    """Check the name, which stands in messages and in the commands that a run ends with."""
    if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in run.dir):
        yield f"run.dir={run.dir!r}: holds a line break or another control character; give a name without"


def tracking_is_accepted(tracking: TrackingConfig) -> Iterator[str]:
    """Check the settings against W&B's own rules, and that Trackio is installed where it is asked for."""
    if "wandb" in tracking.to and tracking.mode != "disabled":
        yield from refused_settings(tracking)
    if "trackio" in tracking.to and not find_spec("trackio"):
        yield (f"tracking.to={tracking.to}: trackio is not installed; pip install 'txl_dist[trackio]', or leave it out")


def data_are_there(data: DataConfig, model: ModelConfig, checkpoint: CheckpointConfig) -> Iterator[str]:
    """Check that the dataset is complete and large enough for the lanes and the model."""
    try:
        index = Index.open(data.dir)
        index.tokenizer()
    except UserError as error:
        yield f"data.dir={error}"  # the error begins with the location
        return
    if data.on_error == "fail":
        errors = index.validate()
        yield from (f"data.dir={error}" for error in errors[:2])
        if len(errors) > 2:
            more = f" ({len(errors) - 3} more shards likewise)" if len(errors) > 3 else ""
            yield f"data.dir={errors[2]}{more}"
    if "train" not in index.splits:
        yield f"data.dir={data.dir}: has no training split, only {', '.join(index.splits)}"
    for name, split in index.splits.items():
        if split.tokens < data.num_lanes:
            yield f"data.num_lanes={data.num_lanes}: more lanes than the split {name} has tokens ({split.tokens:,})"
    if checkpoint.keep_best and "valid" not in index.splits:
        yield f"checkpoint.keep_best=true: {data.dir} has no valid split to find the best by; give false"
    yield from (f"{problem} in {data.dir}" for problem in model.vocabulary_problems(index.vocab_size))


def prompts_can_be_encoded(tracking: TrackingConfig, data: DataConfig) -> Iterator[str]:
    """Check that the tokenizer of the data takes the prompts."""
    try:
        tokenizer = Index.open(data.dir).tokenizer() if tracking.prompts else None
    except UserError:  # data_are_there reports it
        return
    for number, prompt in enumerate(tracking.prompts or []):
        try:
            assert tokenizer is not None
            encode_text(tokenizer, prompt, f"tracking.prompts: text {number + 1}")
        except UserError as error:
            yield str(error)


def objective_fits_the_rest(
    objective: ObjectiveConfig, model: ModelConfig, data: DataConfig, train: TrainConfig
) -> Iterator[str]:
    """Check what the objective asks of model and lanes."""
    if not isinstance(objective, PermutationLMConfig):
        return
    given = "objective=permutation_lm"
    if not reuse_len_of(model):
        yield f"model.name={model.name}: {given} needs a model with reuse_len; give model=xlnet, or objective=causal_lm"
    if data.order != "corpus":
        yield f"data.order={data.order}: {given} reads the text as it stands; give data.order=corpus"
    if data.reset_memory != "never":
        yield f"data.reset_memory={data.reset_memory}: {given} reads across documents; give data.reset_memory=never"
    if data.on_error != "fail":
        yield f"data.on_error={data.on_error}: {given} cannot leave tokens out; give data.on_error=fail"
    if objective.directions == "both" and data.num_lanes % 2:
        yield (
            f"data.num_lanes={data.num_lanes}: with objective.directions=both half of the lanes read backward; give an "
            "even number, or objective.directions=forward"
        )
    if train.loss != "full":
        yield f"train.loss={train.loss}: is for objective=causal_lm; give train.loss=full"


def objective_fits_the_segment(
    objective: ObjectiveConfig, model: ModelConfig, evaluation: ModelChanges
) -> Iterator[str]:
    """Check the numbers of the objective against the lengths of a segment, in training and in evaluation."""
    if not isinstance(objective, PermutationLMConfig) or not reuse_len_of(model):
        return
    problems = list(segment_problems(objective, model, "model"))
    try:
        evaluated = changed_model(model, evaluation, "evaluation")
    except ConfigError:  # evaluation_fits_together reports it
        evaluated = model
    if not problems and evaluated != model:
        problems = list(segment_problems(objective, evaluated, "evaluation"))
    yield from problems


def segment_problems(objective: PermutationLMConfig, model: ModelConfig, section: str) -> Iterator[str]:
    """Yield what does not fit the lengths of a segment, which are given in a section."""
    length = model.tgt_len
    reused = reuse_len_of(model)
    new = length - reused - 3 * objective.pairs  # without <sep> twice and <cls>
    lengths = f"{section}.tgt_len={length} and {section}.reuse_len={reused}"
    if new < 2:
        fewest = reused + 2 + 3 * objective.pairs
        pieces = ", <sep> twice and <cls>" if objective.pairs else ""
        yield (
            f"{section}.tgt_len={length}: has to hold {section}.reuse_len={reused} tokens, two or more new "
            f"ones{pieces}; give {fewest} or more"
        )
        return

    def leaves_context(count: int) -> bool:
        first = replace(objective, num_predict=count).first_targets(length, reused)
        return first < reused and count - first < new

    if not leaves_context(objective.num_predict):
        most = max(filter(leaves_context, range(1, length)))
        yield (
            f"objective.num_predict={objective.num_predict}: with {lengths} no token would be left to predict them "
            f"from in one of the parts, reused and new; give {most} or less"
        )
    if reused % objective.perm_size or (length - reused) % objective.perm_size:
        yield (
            f"objective.perm_size={objective.perm_size}: has to divide the parts of a segment, {reused} reused and "
            f"{length - reused} new tokens ({lengths}); give {gcd(reused, length - reused)} or a divisor of it"
        )


def objective_has_its_data(objective: ObjectiveConfig, model: ModelConfig, data: DataConfig) -> Iterator[str]:
    """Check what the objective asks of the dataset."""
    if not isinstance(objective, PermutationLMConfig):
        return
    try:
        index = Index.open(data.dir)
        specials = index.tokenizer().specials
    except UserError:  # data_are_there reports it
        return
    if objective.pairs:
        missing = [piece for piece in (SEPARATOR, CLASSIFIER) if piece not in specials]
        if missing:
            yield (
                f"objective.pairs=true: the tokenizer of {data.dir} has no {' and no '.join(missing)}; prepare data "
                "with tokenizer=xlnet, or give objective.pairs=false"
            )
        without = [name for name, split in index.splits.items() if split.sentence_starts is None]
        if without:
            yield (
                f"objective.pairs=true: {data.dir} does not know where the sentences of {', '.join(without)} begin; "
                "prepare data with corpus.document=blank_line or tokenizer=xlnet, or give objective.pairs=false"
            )
    for name, split in index.splits.items():
        if split.tokens < model.tgt_len:
            yield (
                f"model.tgt_len={model.tgt_len}: a segment is longer than the split {name} of {data.dir}, which has "
                f"{split.tokens:,} tokens"
            )


def gradients_can_flow_between_segments(
    train: TrainConfig, engine: EngineConfig, objective: ObjectiveConfig
) -> Iterator[str]:
    """Check that several segments of a step can be read one after the other, by the same process."""
    if train.tbptt == 1:
        return
    given = f"train.tbptt={train.tbptt}"
    if not isinstance(objective, CausalLMConfig):
        yield f"{given}: is for objective=causal_lm, which reads segments that follow each other; give train.tbptt=1"
    if train.loss != "full":
        yield f"train.loss={train.loss}: {given} scores all positions; give train.loss=full"
    if engine.pipeline_stages > 1:
        yield (
            f"engine.pipeline_stages={engine.pipeline_stages}: a pipeline has the segments of a lane in flight one by "
            f"one, and no gradient flows between them; give engine.pipeline_stages=1, or train.tbptt=1"
        )


def run_continues_itself(
    run: RunConfig,
    data: DataConfig,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    objective: ObjectiveConfig,
    train: TrainConfig,
) -> Iterator[str]:
    """Check that a run directory with a checkpoint is resumed as the run that it is."""
    from txl_dist.checkpoint.format import latest  # with torch

    try:
        checkpoint = latest(run.dir)
    except UserError as error:
        yield from str(error).splitlines()
        return
    if checkpoint is None:
        return
    if "imported" in checkpoint.state:
        source = checkpoint.state["imported"]["from"]
        yield (
            f"run.dir={run.dir}: holds a model imported from {source}, without optimizer and memory to resume from; "
            "give another run.dir"
        )
        return
    yield from refused_changes(checkpoint.config, run, data, model, optimizer, objective, train)


def initial_weights_fit(
    run: RunConfig, data: DataConfig, model: ModelConfig, objective: ObjectiveConfig
) -> Iterator[str]:
    """Check that a run that begins with the weights of another model can; a run that resumes does not."""
    if run.init_from is None or any(model.problems()):  # others report those
        return
    from txl_dist.checkpoint.format import steps  # with torch, as the next

    if not steps(run.dir):
        from txl_dist.runs.initial_weights import problems_of

        yield from problems_of(run.init_from, model, objective, data.dir)


def skipped_steps_can_be_read(run: RunConfig) -> Iterator[str]:
    """Check the run directory's record of skipped steps."""
    from txl_dist.engine.skipped_steps import read_skipped_steps  # with torch

    try:
        read_skipped_steps(run.dir)
    except UserError as error:
        yield str(error)


def device_is_known(device: str, assume: AssumeConfig) -> Iterator[str]:
    """Check that a plan's device is one of the table, or that all of its figures are given."""
    from txl_dist.tracking.gpu_peak import device_named  # with torch

    figures = ("tflops", "memory", "bandwidth", "link", "watts")
    missing = [f"assume.{key}" for key in figures if getattr(assume, key) is None]
    if missing and device_named(device) is None:
        yield (f"device={device}: is not in the table of devices (tracking/gpu_peak.py); give {', '.join(missing)}")


def tokenizer_fits_corpus(corpus: CorpusConfig, tokenizer: TokenizerConfig) -> Iterator[str]:
    """Check that numbers are the tokens of numbers, and that all of them are tokens."""
    if not isinstance(corpus, TokensCorpusConfig | FilesCorpusConfig | DuplicationCorpusConfig):
        if isinstance(tokenizer, IdsTokenizerConfig):
            yield f"tokenizer=ids: corpus={corpus.name} is text; give another tokenizer, such as bytes"
        return
    if not isinstance(tokenizer, IdsTokenizerConfig):
        yield f"tokenizer={tokenizer.name}: corpus={corpus.name} is numbers, not text; give tokenizer=ids"
        return
    needed = ids_of(corpus)
    if None not in (tokenizer.vocab_size, needed) and tokenizer.vocab_size != needed:
        yield (
            f"tokenizer.vocab_size={tokenizer.vocab_size}: the numbers of corpus={corpus.name} are below {needed}; "
            f"leave it out, or give {needed}"
        )


def files_can_be_read(corpus: CorpusConfig) -> Iterator[str]:
    """Check that what is given of images and sounds is given where there are some, and that they can be read."""
    if not isinstance(corpus, FilesCorpusConfig):
        return
    if corpus.read == "image":
        if corpus.size is None:
            yield "corpus.size: is missing; give [height,width], to which images are cut and scaled"
        if not find_spec("PIL"):
            yield "corpus.read=image: Pillow is not installed; pip install 'txl_dist[images]'"
    elif corpus.size is not None:
        yield f"corpus.size={corpus.size}: is for corpus.read=image, not {corpus.read}; leave it out"
    if corpus.rate is not None and corpus.read != "audio":
        yield f"corpus.rate={corpus.rate}: is for corpus.read=audio, not {corpus.read}; leave it out"


def columns_are_named(corpus: CorpusConfig) -> Iterator[str]:
    """Check that the columns to read are among those that are given, and that the format has columns at all."""
    if not isinstance(corpus, ExamplesCorpusConfig):
        return
    if corpus.format in ("jsonl", "label_text") and corpus.columns is not None:
        yield f"corpus.columns: is for tsv and csv; corpus.format={corpus.format} has none, leave it out"
    if corpus.format == "label_text" and corpus.text_pair is not None:
        yield f"corpus.text_pair={corpus.text_pair}: corpus.format=label_text has one text per line; leave it out"
    keys = [key for key in ("text", "text_pair", "label") if getattr(corpus, key) is not None]
    if len({getattr(corpus, key) for key in keys}) < len(keys):
        given = ", ".join(f"corpus.{key}={getattr(corpus, key)}" for key in keys)
        yield f"{given}: name one column twice; give another to each"
    if corpus.columns is None:
        return
    if len(set(corpus.columns)) < len(corpus.columns):
        yield f"corpus.columns={corpus.columns}: names a column twice; give each a name of its own"
    for key in keys:
        name = getattr(corpus, key)
        if name not in corpus.columns:
            yield f"corpus.{key}={name}: is not among corpus.columns={corpus.columns}; give one of them"


Check = Callable[..., Iterator[str]]
# What can be said of a run that starts elsewhere.
PLANNED: list[Check] = [
    lanes_can_be_split,
    stages_can_be_cut,
    model_fits_together,
    evaluation_fits_together,
    attention_can_be_computed,
    engine_is_sound,
    patterns_are_sound,
    steps_are_in_order,
    checkpoints_can_be_kept,
    profile_is_of_training,
    rates_are_in_order,
    run_dir_can_be_printed,
    objective_fits_the_rest,
    objective_fits_the_segment,
    task_fits_the_rest,
    gradients_can_flow_between_segments,
]
CHECKS: dict[type, list[Check]] = {
    PrepareJob: [tokenizer_fits_corpus, files_can_be_read, columns_are_named],
    PlanJob: [*PLANNED, device_is_known, language_model_is_planned],
    TrainJob: [
        *PLANNED,
        tracking_is_accepted,
        data_are_there,
        prompts_can_be_encoded,
        objective_has_its_data,
        task_has_its_data,
        run_continues_itself,
        initial_weights_fit,
        skipped_steps_can_be_read,
    ],
}
