"""The schema of checkpoint.json: a manifest that passes it has every key that is read later, whoever wrote it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

from txl_dist.config.sections import parse_model
from txl_dist.files.parsing import FileName, Number, Sha256, Size, Version
from txl_dist.models import registry

PositiveInt = Annotated[Size, Field(ge=1)]
TensorFile = Annotated[str, Field(pattern=r"^(weights|optimizer|memory)-\d{5,}\.safetensors$", max_length=255)]


class FileEntry(BaseModel):
    bytes: Size
    sha256: Sha256


class OriginEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    step: Size = 0
    tokens: Size = 0


class OptimizerNumbers(BaseModel):
    state: dict[str, Number]
    group: dict[Literal["step"], Size]
    loss_scaler: dict[str, Number]


class Versions(BaseModel):
    """The packages that wrote a checkpoint; early checkpoints of 0.1.0 do not name them."""

    txl_dist: Version | None = None
    torch: Version | None = None
    deepspeed: Version | None = None


class WrittenBy(Versions):
    ranks: PositiveInt
    precision: str


class State(BaseModel):
    """The state of a run that was trained by txl_dist."""

    step: Size
    tokens: Size
    origin: OriginEntry = OriginEntry()
    optimizer: OptimizerNumbers
    losses: list[Number] = []
    written_by: WrittenBy | None = None  # not recorded by earlier versions
    valid_loss: Number | None = None

    @model_validator(mode="after")
    def lanes_begin_before_step(self) -> "State":
        """Refuse lanes that begin after the step of the checkpoint."""
        if self.origin.step > self.step:
            raise ValueError(f"the lanes began at step {self.origin.step}, after step {self.step}")
        return self


class RunSection(BaseModel):
    seed: Annotated[int, Strict(), Field(ge=0, lt=1 << 64)]


class DataSection(BaseModel):
    dir: str
    num_lanes: PositiveInt
    order: Literal["corpus", "documents"]
    reset_memory: Literal["never", "document"]


class ModelSection(BaseModel):
    """The section of a model; all of it is checked where its architecture is installed."""

    name: str
    n_layer: PositiveInt
    tgt_len: PositiveInt

    @model_validator(mode="before")
    @classmethod
    def fits_its_architecture(cls, values: Any) -> Any:
        """Parse the section; without the architecture that cannot be, which is no damage."""
        if isinstance(values, dict) and registry.is_installed(values.get("name")):
            parse_model(values)
        return values


class OptimizerSection(BaseModel):
    name: str
    average_from: PositiveInt | None = None


class TrainSection(BaseModel):
    max_steps: PositiveInt


class EngineSection(BaseModel):
    pipeline_stages: PositiveInt = 1
    zero_stage: Size
    gradient_accumulation: PositiveInt
    offload: str


class Config(BaseModel):
    run: RunSection
    data: DataSection
    model: ModelSection
    optimizer: OptimizerSection
    train: TrainSection
    engine: EngineSection


class Data(BaseModel):
    """The data that a run was trained on; `unlogged` has the metrics of a step whose evaluation was interrupted."""

    fingerprint: Sha256
    vocab_size: PositiveInt
    tokenizer: dict[FileName, Sha256] = {}
    place: str | None = None
    unlogged: dict[str, Number | None] | None = None


class Manifest(BaseModel):
    """The manifest of a checkpoint that was trained by txl_dist."""

    files: dict[TensorFile, FileEntry]
    state: State
    config: Config
    data: Data


# ----------------------------------------------------------------------------------------- imported models


class ImportedFrom(BaseModel):
    from_: Annotated[str, Field(alias="from")]
    title: str


class ImportedState(BaseModel):
    step: Literal[0]
    tokens: Literal[0]
    imported: ImportedFrom
    written_by: Versions | None = None
    valid_loss: None = None


class ImportedDataSection(BaseModel):
    dir: str | None
    reset_memory: Literal["never", "document"]


class ImportedConfig(BaseModel):
    model: ModelSection
    data: ImportedDataSection


class ImportedData(BaseModel):
    fingerprint: None
    vocab_size: PositiveInt
    tokenizer: dict[FileName, Sha256] = {}


class ImportedManifest(BaseModel):
    """The manifest of a model that txl_dist.convert has imported."""

    files: dict[TensorFile, FileEntry]
    state: ImportedState
    config: ImportedConfig
    data: ImportedData
