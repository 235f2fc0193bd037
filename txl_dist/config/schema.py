"""The schema of conf/: the types and limits of its values. conf/*.yaml explains each key where it stands.

The section of a model is described beside the model. What must hold of several values together is in checks.py and
run_checks.py.
"""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, Strict
from pydantic.dataclasses import dataclass

from txl_dist.config.sections import AnyModel, changed_model
from txl_dist.config.types import (
    ALWAYS,
    FLOAT32_MAX,
    INT32_MAX,
    LANES,
    NEVER,
    SCHEMA,
    BoolOrAuto,
    CheckpointChoice,
    Fraction,
    NonNegative,
    NonNegativeInt,
    PathList,
    PathStr,
    Port,
    Positive,
    PositiveInt,
    RunDir,
    RunDirs,
    Seconds,
    Seed,
    Share,
    Size,
    StrictBool,
    StrList,
    Workers,
)
from txl_dist.models.config import ModelConfig

ModelChanges = dict[str, Any]  # keys of a trained model's section that are to be others now; null: as trained


# ------------------------------------------------------------------------------------------------------ prepare


@dataclass(config=SCHEMA, frozen=True)
class StdlibCorpusConfig:
    """The standard library of the Python that runs: the corpus of the first run, which needs no download."""

    name: Literal["stdlib"]
    valid_share: Fraction
    test_share: Fraction


@dataclass(config=SCHEMA, frozen=True)
class TextCorpusConfig:
    """Text files of the user's own, as one collection that is split, or with files for each split."""

    name: Literal["text"]
    path: PathList | None
    train: PathList | None
    valid: PathList | None
    test: PathList | None
    document: Literal["file", "line", "blank_line"]
    split_by: Literal["auto", "document", "position"]
    valid_share: Fraction
    test_share: Fraction


@dataclass(config=SCHEMA, frozen=True)
class PublishedCorpusConfig:
    """A corpus of the Transformer-XL paper. path: the archive, or the folder with its files; null: downloaded."""

    name: Literal["ptb", "wikitext2", "wikitext103", "enwik8", "text8", "lm1b"]
    path: PathStr | None


@dataclass(config=SCHEMA, frozen=True)
class TokensCorpusConfig:
    """Files of integers, in which each sequence is a document. key: of the sequence, in JSON objects."""

    name: Literal["tokens"]
    path: PathList | None
    train: PathList | None
    valid: PathList | None
    test: PathList | None
    key: str
    valid_share: Fraction
    test_share: Fraction


@dataclass(config=SCHEMA, frozen=True)
class FilesCorpusConfig:
    """Any files as documents of numbers from 0 to 255.

    read: the bytes of a file; the pixels of an image, which is cut and scaled to `size`; the samples of a WAV file.
    """

    name: Literal["files"]
    path: PathList | None
    train: PathList | None
    valid: PathList | None
    test: PathList | None
    read: Literal["bytes", "image", "audio"]
    size: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None
    channels: Literal[1, 3]
    rate: Size | None
    valid_share: Fraction
    test_share: Fraction


@dataclass(config=SCHEMA, frozen=True)
class DuplicationCorpusConfig:
    """Drawn sequences 0w0w (Kitaev et al. 2020, section 5.1): the second half can be known from the first."""

    name: Literal["duplication"]
    length: Annotated[int, Strict(), Field(ge=4, le=INT32_MAX, multiple_of=2)]
    num_train: PositiveInt
    num_valid: NonNegativeInt
    num_test: NonNegativeInt
    seed: Seed


@dataclass(config=SCHEMA, frozen=True)
class ExamplesCorpusConfig:
    """Files of labelled texts, or pairs of texts.

    columns: of files without a header. text, text_pair, label: the columns, or keys of JSON objects, that are read.
    """

    name: Literal["examples"]
    path: PathList | None
    train: PathList | None
    valid: PathList | None
    test: PathList | None
    format: Literal["auto", "tsv", "csv", "jsonl", "label_text"]
    columns: Annotated[list[str], Field(min_length=1)] | None
    text: str
    text_pair: str | None
    label: str
    kind: Literal["labels", "scores"]
    valid_share: Fraction
    test_share: Fraction


@dataclass(config=SCHEMA, frozen=True)
class SquadCorpusConfig:
    """Files of questions about passages in SQuAD's JSON."""

    name: Literal["squad"]
    path: PathList | None
    train: PathList | None
    valid: PathList | None
    test: PathList | None
    valid_share: Fraction
    test_share: Fraction


@dataclass(config=SCHEMA, frozen=True)
class BytesTokenizerConfig:
    """The 256 bytes as tokens."""

    name: Literal["bytes"]


@dataclass(config=SCHEMA, frozen=True)
class WordTokenizerConfig:
    """Words, separated by white space, as tokens."""

    name: Literal["word"]
    vocab_size: Annotated[int, Strict(), Field(ge=3)] | None
    min_count: PositiveInt
    vocab: PathStr | None  # a file, a word a line; null: the training split's words


MIN_PIECES = 300  # of a SentencePiece vocabulary: 256 are bytes


@dataclass(config=SCHEMA, frozen=True)
class SentencePieceTokenizerConfig:
    """A SentencePiece model that is trained on the training split, or given."""

    name: Literal["sentencepiece"]
    vocab_size: Annotated[int, Strict(), Field(ge=MIN_PIECES, le=INT32_MAX)]
    type: Literal["unigram", "bpe"]
    model: PathStr | None


MIN_XLNET_PIECES = 64  # of an XLNet vocabulary: 9 are special, and 8 are marks


@dataclass(config=SCHEMA, frozen=True)
class XLNetTokenizerConfig:
    """A SentencePiece model with XLNet's special pieces, that is trained on the training split, or given."""

    name: Literal["xlnet"]
    vocab_size: Annotated[int, Strict(), Field(ge=MIN_XLNET_PIECES, le=INT32_MAX)]
    lower: StrictBool
    model: PathStr | None


@dataclass(config=SCHEMA, frozen=True)
class IdsTokenizerConfig:
    """The numbers of sequences that are not text as tokens.

    vocab_size: the numbers are below it, and `<eos>` is it; null: as the corpus needs. end: whether `<eos>` stands
    behind every document; null: unless all have one length.
    """

    name: Literal["ids"]
    vocab_size: Annotated[int, Strict(), Field(ge=1, lt=INT32_MAX)] | None
    end: StrictBool | None


LabelledCorpusConfig = ExamplesCorpusConfig | SquadCorpusConfig  # for fine-tuning
PathsCorpusConfig = (  # of the user's own files
    TextCorpusConfig | TokensCorpusConfig | FilesCorpusConfig | LabelledCorpusConfig
)
IdsCorpusConfig = TokensCorpusConfig | FilesCorpusConfig | DuplicationCorpusConfig  # numbers, for tokenizer=ids
CorpusConfig = Annotated[
    StdlibCorpusConfig | PublishedCorpusConfig | PathsCorpusConfig | DuplicationCorpusConfig,
    Field(discriminator="name"),
]
TokenizerConfig = Annotated[
    BytesTokenizerConfig
    | WordTokenizerConfig
    | SentencePieceTokenizerConfig
    | XLNetTokenizerConfig
    | IdsTokenizerConfig,
    Field(discriminator="name"),
]


def ids_of(corpus: IdsCorpusConfig) -> int | None:
    """Return below which number all numbers of a corpus are; None where its files say it."""
    if isinstance(corpus, TokensCorpusConfig):
        return None
    return 256 if isinstance(corpus, FilesCorpusConfig) else 128


@dataclass(config=SCHEMA, frozen=True)
class DatasetConfig:
    """Where a dataset is written, and how it is cut into samples (of tokens) and shards (of samples)."""

    dir: PathStr
    sample_tokens: Annotated[int, Strict(), Field(ge=16, le=INT32_MAX)]
    shard_samples: Size


@dataclass(config=SCHEMA, frozen=True)
class PrepareJob:
    """Make a dataset."""

    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    data: DatasetConfig
    workers: Workers | None


# -------------------------------------------------------------------------------------------------------- train


@dataclass(config=SCHEMA, frozen=True)
class RunConfig:
    """The run directory is the run's identity: starting with the same `dir` again resumes the run.

    init_from: a run directory or a third-party checkpoint, whose weights a new run begins with; resuming ignores it.
    on_lane_change: whether it may be resumed with other lanes (another value of a key that is marked LANES), at the
    same share of the epoch but with empty memories.
    """

    dir: RunDir
    seed: Annotated[Seed, NEVER]
    on_lane_change: Literal["refuse", "reset_memory"]
    init_from: PathStr | None = None


@dataclass(config=SCHEMA, frozen=True)
class DataConfig:
    """The lanes: how many, in which order they read the corpus, where their memory is reset.

    on_error: whether a damaged sample ends training, or its tokens are dropped: they are not scored, and what follows
    is read as if a document began there. Evaluation never drops tokens: the loss of a part would be a wrong number.
    """

    dir: PathStr
    num_lanes: Annotated[Size, LANES]
    order: Annotated[Literal["corpus", "documents"], NEVER]
    reset_memory: Annotated[Literal["never", "document"], NEVER]
    workers: Workers  # background threads that read ahead; the batches do not depend on their number
    on_error: Literal["fail", "skip_sample"] = "fail"


@dataclass(config=SCHEMA, frozen=True)
class CausalLMConfig:
    """Predict each token from those before it."""

    name: Annotated[Literal["causal_lm"], NEVER]

    def stride(self, model: ModelConfig) -> int:
        """Return how many tokens a lane moves on by in a step."""
        return model.tgt_len


@dataclass(config=SCHEMA, frozen=True)
class PermutationLMConfig:
    """Predict some tokens of a segment in a random order (Yang et al. 2019), with a model that has reuse_len.

    num_predict: tokens of each segment. perm_size: of the blocks within which the order is random. spans: what is
    predicted are whole words, or tokens from the start of a word on. pairs: a segment is two stretches of text with
    <sep> and <cls>, or a continuous one. directions: whether half of the lanes read backward.
    """

    name: Annotated[Literal["permutation_lm"], NEVER]
    num_predict: Annotated[Size, NEVER]
    perm_size: Annotated[Size, NEVER]
    spans: Annotated[Literal["words", "tokens"], NEVER]
    pairs: Annotated[StrictBool, NEVER]
    directions: Annotated[Literal["both", "forward"], NEVER]

    def stride(self, model: ModelConfig) -> int:
        """Return how many tokens a lane moves on by in a step: it reads the others again."""
        return reuse_len_of(model) or model.tgt_len

    def first_targets(self, tgt_len: int, reuse_len: int) -> int:
        """Return how many of num_predict are among the first reuse_len tokens: their share of the segment."""
        return round(self.num_predict * reuse_len / tgt_len)


@dataclass(config=SCHEMA, frozen=True)
class ClassificationConfig:
    """Say the class or the score of each example of a dataset of examples.

    max_tokens: longer examples are cut, marks included; null: they are read segment by segment, with memory.
    dropout: of the head; null: as that of the model.
    """

    name: Annotated[Literal["classification"], NEVER]
    max_tokens: Annotated[Size | None, NEVER]
    dropout: Annotated[Fraction | None, ALWAYS]

    def stride(self, model: ModelConfig) -> int:
        """Return how many positions a lane moves on by in a step."""
        return model.tgt_len


@dataclass(config=SCHEMA, frozen=True)
class SpanQAConfig:
    """Answer questions by a span of a passage.

    head: beam: the end is found after the start, and whether there is an answer apart (XLNet's). simple: both from
    each position alone. passage_first: what stands first, passage or question. doc_stride: tokens from one window on a
    long passage to the next; null: as many as a window holds.
    """

    name: Annotated[Literal["span_qa"], NEVER]
    head: Annotated[Literal["beam", "simple"], NEVER]
    passage_first: Annotated[StrictBool, NEVER]
    doc_stride: Annotated[Size | None, NEVER]
    max_question_tokens: Annotated[Size, NEVER]
    max_answer_tokens: Annotated[Size, ALWAYS]

    def stride(self, model: ModelConfig) -> int:
        """Return how many positions a lane moves on by in a step."""
        return model.tgt_len


def reuse_len_of(model: ModelConfig) -> int:
    """Return how many tokens of a segment a model remembers, where it reads others ahead; 0 for a model that cannot."""
    return getattr(model, "reuse_len", 0)


TaskConfig = ClassificationConfig | SpanQAConfig  # of what is said of examples
ObjectiveConfig = Annotated[CausalLMConfig | PermutationLMConfig | TaskConfig, Field(discriminator="name")]


@dataclass(config=SCHEMA, frozen=True)
class OptimizerConfig:
    """The optimizer, the clipping of gradients and the averaging of weights.

    lr_scale: regular expression -> factor of the learning rate, for the parameters whose name the expression finds; the
    first that does counts. layer_decay: factor of the learning rate from each layer to the one below it. average_from:
    keep the mean of the weights after each step from this one on; null: none.
    """

    name: Literal["adam", "adamw", "lamb"]
    lr: Positive
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)]
    eps: Positive
    weight_decay: NonNegative
    clip: NonNegative  # largest norm of the gradient of all parameters; 0: no clipping
    lr_scale: dict[str, Positive]
    average_from: Annotated[PositiveInt | None, NEVER]
    layer_decay: Share = 1.0


@dataclass(config=SCHEMA, frozen=True)
class ScheduleConfig:
    """The learning rate: linear warm-up from 0, then a decay of this shape to `min_lr` at train.max_steps."""

    name: Literal["cosine", "inverse_sqrt", "linear", "constant"]
    warmup_steps: NonNegativeInt
    min_lr: NonNegative


@dataclass(config=SCHEMA, frozen=True)
class TrainConfig:
    """Lengths in optimizer steps. `stop_at` ends this start cleanly; the schedule still runs to `max_steps`.

    loss: of all positions of a segment, or of its second half only (Dai et al. 2019, table 6).
    tbptt: how many segments a step reads of each lane; gradients flow through the states between them.
    profile: the first and the last step to be profiled, numbered as in the log; null: none.
    """

    max_steps: PositiveInt
    stop_at: PositiveInt | None
    loss: Literal["full", "second_half"]
    eval_every: PositiveInt
    profile: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None
    tbptt: Annotated[Size, LANES] = 1


@dataclass(config=SCHEMA, frozen=True)
class CheckpointConfig:
    """How often checkpoints are written, in optimizer steps, and which of them are kept.

    One is written after the last step, too. Kept are the latest `keep_last`, those whose step is a multiple of
    `keep_every`, and with `keep_best` the one with the lowest valid/loss.
    """

    every: PositiveInt
    keep_last: PositiveInt
    keep_every: PositiveInt | None
    keep_best: StrictBool


@dataclass(config=SCHEMA, frozen=True)
class EngineConfig:
    """How the work is split; every start of a run may split it differently.

    stage_layers: layers per pipeline stage; the first stage also has the embedding, the last one the softmax; null:
    balanced by counted floating-point operations. attention: the backend (models/layers/backends.py).
    compile: torch.compile the layers for training; auto: on GPUs, where that is possible.
    peak_tflops: peak TFLOP/s of one device in this precision, for train/mfu; null: from the data sheet where the device
    is a known one (tracking/gpu_peak.py), else there is no train/mfu.
    """

    zero_stage: Literal[0, 1, 2, 3]
    pipeline_stages: PositiveInt
    stage_layers: list[NonNegativeInt] | None
    gradient_accumulation: PositiveInt
    activation_checkpointing: StrictBool
    attention: Literal["auto", "reference", "sdpa", "triton"]
    compile: BoolOrAuto
    offload: Literal["none", "optimizer", "parameters"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    peak_tflops: Positive | None


@dataclass(config=SCHEMA, frozen=True)
class GuardConfig:
    """The reaction to bad steps and stalls (engine/anomaly_guard.py, distributed/watchdog.py).

    on_bad_step: end the run, skip the update of this step, or resume from the last checkpoint and skip the step then. A
    step is bad whose loss or gradient is not finite, or whose loss is a spike. spike: how far a loss may be above the
    median of the last `window` steps, in their scaled median absolute deviations; null: no loss is too high.
    max_bad_steps: more among the last `window` steps end the run. stall_timeout: in seconds; null: wait forever.
    """

    on_bad_step: Literal["stop", "skip", "rollback"]
    spike: Positive | None
    window: Annotated[int, Strict(), Field(ge=2, le=INT32_MAX)]
    max_bad_steps: PositiveInt
    stall_timeout: Seconds | None


@dataclass(config=SCHEMA, frozen=True)
class TrackingConfig:
    """Metrics go to metrics.jsonl and the console always, and to the trackers in `to`.

    mode: of W&B; auto: online with a key, else offline; disabled: as without it in `to`.
    project, name, entity, group, job_type, tags, notes: null: as W&B's own variables and files say; the project is else
    txl_dist, the name that of the run directory.
    memory_every: what the memory does, at every so many steps; null: at evaluations; 0: never.
    watch_every: norms of weights, gradients, updates and activations; null: never.
    prompts: are continued by sample_tokens tokens at evaluations.
    """

    mode: Literal["auto", "online", "offline", "disabled"]
    log_every: PositiveInt
    project: str | None
    name: str | None
    to: list[Literal["wandb", "trackio"]] = field(default_factory=lambda: ["wandb"])
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: StrList | None = None
    notes: str | None = None
    memory_every: NonNegativeInt | None = None
    watch_every: PositiveInt | None = None
    prompts: StrList | None = None
    sample_tokens: PositiveInt = 64


@dataclass(config=SCHEMA, frozen=True)
class TrainJob:
    """Train, or resume, a run."""

    run: RunConfig
    data: DataConfig
    model: AnyModel
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    evaluation: ModelChanges
    engine: EngineConfig
    guard: GuardConfig
    tracking: TrackingConfig

    @property
    def stride(self) -> int:
        """Return how many tokens a lane moves on by in a step."""
        return self.train.tbptt * self.objective.stride(self.model)

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of one optimizer step, of all lanes."""
        return self.data.num_lanes * self.stride

    @property
    def evaluated_model(self) -> ModelConfig:
        """Return the model as evaluation reads it."""
        return changed_model(self.model, self.evaluation, "evaluation")

    @property
    def first_scored(self) -> int:
        """Return the first position of a segment that counts in the loss of training."""
        return self.model.tgt_len // 2 if self.train.loss == "second_half" else 0


# --------------------------------------------------------------------------------------------------------- plan


@dataclass(config=SCHEMA, frozen=True)
class AssumeConfig:
    """What a plan assumes of devices, network and disk; null: what the table of devices says.

    Shares are of what the device could do at best. Rates in GB/s, memory in GiB, launch in microseconds.
    """

    tflops: Positive | None
    memory: Positive | None
    bandwidth: Positive | None
    link: Positive | None
    watts: Positive | None
    product_share: Share
    bandwidth_share: Share
    memory_share: Share
    network_share: Share
    launch: NonNegative
    network: Positive
    host: Positive
    disk: Positive
    node_watts: NonNegative


@dataclass(config=SCHEMA, frozen=True)
class PlanJob(TrainJob):
    """Say what a run would need on so many devices of a kind, and how fast it would be; it has all keys of train, too.

    vocab_size, epoch_tokens: of the data; null: as data.dir says, where it is there. measured: a run directory whose
    speed is taken instead of the assumed one. search: try all splits.
    """

    nodes: Size
    gpus: Size
    device: str
    vocab_size: Size | None
    epoch_tokens: PositiveInt | None
    measured: RunDir | None
    search: StrictBool
    format: Literal["table", "json"]
    assume: AssumeConfig


# ------------------------------------------------------------------- evaluate, generate, inspect, dashboard, convert


@dataclass(config=SCHEMA, frozen=True)
class EvaluateJob:
    """Evaluate runs on a split.

    max_tokens: only the first ones of the split. sliding_window: predict each token from the tgt_len tokens before it,
    without memory.
    """

    run: RunDirs
    split: Literal["train", "valid", "test"]
    format: Literal["table", "json"]
    checkpoint: CheckpointChoice
    num_lanes: Size
    max_tokens: PositiveInt | None
    sliding_window: StrictBool
    data_dir: PathStr | None
    average: StrictBool
    model: ModelChanges


@dataclass(config=SCHEMA, frozen=True)
class GenerateJob:
    """Continue prompts; null: standard input is the prompt. max_tokens: null: 300, or what an image lacks."""

    run: RunDir
    prompt: StrList | None
    max_tokens: NonNegativeInt | None
    temperature: NonNegative
    top_k: NonNegativeInt
    top_p: Annotated[float, Strict(), Field(gt=0, le=1, allow_inf_nan=False)]
    seed: Seed
    checkpoint: CheckpointChoice
    average: StrictBool
    model: ModelChanges
    format: Literal["text", "ids", "png", "wav"] = "text"
    out: PathStr | None = None


@dataclass(config=SCHEMA, frozen=True)
class InspectJob:
    """Show what a checkpoint holds; verify: compare the SHA-256 of all its files."""

    run: RunDir
    checkpoint: CheckpointChoice
    verify: StrictBool
    format: Literal["table", "json"]


@dataclass(config=SCHEMA, frozen=True)
class ScoreJob:
    """Score each token of a text (null: of standard input), and show the `next` likeliest ones after it.

    context: from the text on the left of a token, or on both sides of it; then there are no next ones.
    """

    run: RunDir
    text: str | None
    context: Literal["left", "both"]
    next: NonNegativeInt
    format: Literal["table", "json"]
    checkpoint: CheckpointChoice
    average: StrictBool
    model: ModelChanges


@dataclass(config=SCHEMA, frozen=True)
class PredictJob:
    """Say the class or the score of the examples of a file (null: standard input), or answer its questions.

    threshold: no answer is given to a question whose no_answer is above it; null: one is always given.
    """

    run: RunDir
    file: PathStr | None
    input: Literal["auto", "lines", "json"]
    output: Literal["json", "squad"]
    threshold: Annotated[float, Strict(), Field(ge=-FLOAT32_MAX, le=FLOAT32_MAX, allow_inf_nan=False)] | None
    num_lanes: Size
    checkpoint: CheckpointChoice
    average: StrictBool
    model: ModelChanges


@dataclass(config=SCHEMA, frozen=True)
class LookJob:
    """Write a page that shows what memory and attention do in a text (null: standard input).

    max_tokens: a longer text is cut. A page stores distances in 16 bits.
    """

    run: RunDir
    text: str | None
    to: PathStr
    max_tokens: Annotated[int, Strict(), Field(ge=1, le=65_535)]
    checkpoint: CheckpointChoice
    average: StrictBool
    model: ModelChanges


@dataclass(config=SCHEMA, frozen=True)
class DashboardJob:
    """Write the dashboard of runs to the file `to` (null: its default place), or serve it at a port."""

    run: RunDirs
    to: PathStr | None
    serve: StrictBool
    port: Port


@dataclass(config=SCHEMA, frozen=True)
class ReclJob:
    """Measure the effective context of runs.

    positions: tokens that are evaluated, evenly spread over the split. step, max_context: in tokens.
    """

    run: RunDirs
    split: Literal["train", "valid", "test"]
    step: Size
    max_context: Size
    positions: PositiveInt
    num_lanes: Size
    format: Literal["table", "json"]
    data_dir: PathStr | None


@dataclass(config=SCHEMA, frozen=True)
class ConvertJob:
    """Import a model as a run (`from_`; the key is `from`) or export a run (`to`); exactly one of them is given.

    pairs: whether an imported classifier reads pairs of texts.
    """

    run: RunDir
    from_: PathStr | None
    to: RunDir | None
    tokenizer_from: PathStr | None
    checkpoint: CheckpointChoice
    model: ModelChanges
    pairs: StrictBool = False
