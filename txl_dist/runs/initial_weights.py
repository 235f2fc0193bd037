"""Where a new run takes its first weights from (run.init_from): another run, or a third-party checkpoint."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from txl_dist.checkpoint.format import Checkpoint, latest, steps
from txl_dist.checkpoint.initial_weights import InitialWeights
from txl_dist.config.schema import ConvertJob, ObjectiveConfig, TaskConfig, TrainJob
from txl_dist.config.sections import parse_model
from txl_dist.config.types import NEVER
from txl_dist.conversion.importing import model_config
from txl_dist.conversion.sources import is_importable, open_import_source
from txl_dist.data.index import Index
from txl_dist.data.tokenizers import Tokenizer
from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.errors import ConfigError, UserError
from txl_dist.models import registry
from txl_dist.models.base import TASK_HEAD
from txl_dist.models.config import ModelConfig
from txl_dist.models.shapes import parameter_shapes
from txl_dist.runs.load import load_tokenizer

KEY = "run.init_from"
INITIAL_ONLY = "init_std"  # says how weights are drawn, and none are


@dataclass(frozen=True)
class Origin:
    """A model whose weights a run is to begin with.

    Attributes:
        title: what it is, for people.
        tokenizer: reads its tokenizer; None: it has none.
        shapes: returns the shapes of its weights by name.
        read: returns at least the weights of these names.
    """

    title: str
    config: ModelConfig
    vocab_size: int
    tokenizer: Callable[[], Tokenizer] | None
    shapes: Callable[[], Mapping[str, tuple[int, ...]]]
    read: Callable[[Iterable[str]], Mapping[str, Tensor]]


def initial_weights(job: TrainJob, index: Index, group: ProcessGroup) -> InitialWeights | None:
    """Find the weights that a new run begins with; None where run.init_from names none. Every rank must call it.

    The checkpoint of another run, which may be training now, is chosen by rank zero for all.

    Raises:
        ConfigError: on every rank, if one of them cannot read the weights, or they do not fit the run.
    """
    path = job.run.init_from
    if path is None:
        return None
    problems: list[str] = []
    checkpoint = None
    origin = None
    is_run = group.broadcast(not is_importable(Path(path)))
    if is_run and group.is_rank_zero:
        try:
            checkpoint = latest_checkpoint(path, contents=True)
        except UserError as error:
            problems = lines_of(error, path)
    checkpoint = group.broadcast(checkpoint)
    if checkpoint or not is_run:
        try:
            origin = of_run(path, checkpoint) if checkpoint else of_third_party(path, job.model)
            problems = list(differences(path, origin, job.model, job.objective, job.data.dir, index))
        except UserError as error:
            problems = lines_of(error, path)
    problems = group.gather(problems)
    if problems:
        raise ConfigError(problems)
    assert origin is not None
    return InitialWeights(origin.title, partial(read_body, origin))


def read_body(origin: Origin, names: Iterable[str]) -> Mapping[str, Tensor]:
    """Return the weights of these names but those of a task's head: each run draws its own."""
    return origin.read([name for name in names if not name.startswith(f"{TASK_HEAD}.")])


def problems_of(path: str, model: ModelConfig, objective: ObjectiveConfig, data_dir: str) -> Iterator[str]:
    """Yield why a run of this model on this dataset cannot begin with the weights at a path."""
    try:
        index = Index.open(data_dir)
        index.tokenizer()
    except UserError:  # which is reported where the dataset is checked
        return
    try:
        if is_importable(Path(path)):
            origin = of_third_party(path, model)
        else:
            origin = of_run(path, latest_checkpoint(path, contents=False))
        yield from differences(path, origin, model, objective, data_dir, index)
    except UserError as error:
        yield from lines_of(error, path)


def lines_of(error: UserError, path: str) -> list[str]:
    """Return the lines of an error, with our key in place of that of the import."""
    return [line.replace(f"from={path}", f"{KEY}={path}", 1) for line in str(error).splitlines()]


# --------------------------------------------------------------------------------------------------- the origins


def latest_checkpoint(path: str, contents: bool) -> Checkpoint:
    """Return the latest valid checkpoint of a run directory.

    Raises:
        UserError: where there is none.
    """
    if not Path(path).is_dir():
        raise UserError(f"{KEY}={path}: there is no such run directory, folder or file")
    checkpoint = latest(path, contents) if steps(path) else None
    if checkpoint is None:
        raise UserError(f"{KEY}={path}: is neither a run directory with a checkpoint nor a third-party checkpoint")
    return checkpoint


def of_run(path: str, checkpoint: Checkpoint) -> Origin:
    """Describe a run's checkpoint."""
    return Origin(
        title=f"step {checkpoint.step:,} of {path}",
        config=parse_model(checkpoint.config["model"]),
        vocab_size=checkpoint.data["vocab_size"],
        tokenizer=partial(load_tokenizer, path, checkpoint),
        shapes=partial(checkpoint.shapes, "weights"),
        read=partial(checkpoint.tensors, "weights"),
    )


def of_third_party(path: str, model: ModelConfig) -> Origin:
    """Describe a third-party checkpoint; what it does not state is as in the model that is to begin with it.

    Raises:
        UserError: where it cannot be read, or its tensors are not those that it states.
    """
    source = open_import_source(Path(path))
    name = source.hyper_parameters["name"]
    if name != model.name:
        raise UserError(f"model.name={model.name}: {path} holds a model of {name}; give model={name}")
    given: dict[str, Any] = {key: value for key, value in asdict(model).items() if key in model.read_otherwise()}
    unstated = [key for key in source.also_accepted if key not in source.hyper_parameters]
    given |= {key: getattr(model, key) for key in unstated}
    job = ConvertJob(run="none", from_=path, to=None, tokenizer_from=None, checkpoint=None, model=given)
    config = model_config(job, source)
    weights = source.weights(config)
    return Origin(
        title=f"{source.title}, {path}",
        config=config,
        vocab_size=source.vocab_size,
        tokenizer=source.load_tokenizer,
        shapes=lambda: {name: tuple(value.shape) for name, value in weights.items()},
        read=lambda names: weights,
    )


# ------------------------------------------------------------------------------------------- what must be the same


def differences(
    path: str, origin: Origin, model: ModelConfig, objective: ObjectiveConfig, data_dir: str, index: Index
) -> Iterator[str]:
    """Yield what is not the same in the origin of weights and in the run that is to begin with them."""
    if origin.config.name != model.name:
        yield (
            f"model.name={model.name}: {path} holds a model of {origin.config.name}; give model={origin.config.name}"
        )
        return
    theirs = asdict(origin.config)
    fixed = [key for key, when in model.may_change().items() if when is NEVER and key != INITIAL_ONLY]
    differ = [key for key in fixed if getattr(model, key) != theirs[key]]
    for key in differ:
        yield f"model.{key}={getattr(model, key)}: the model of {KEY}={path} has {theirs[key]}; give that"
    if index.vocab_size != origin.vocab_size:
        yield (
            f"data.dir={data_dir}: its vocabulary has {index.vocab_size:,} tokens, but the model of {KEY}={path} "
            f"{origin.vocab_size:,}; prepare the data with that model's tokenizer"
        )
    elif origin.tokenizer is not None and contents(origin.tokenizer()) != contents(index.tokenizer()):
        yield (
            f"data.dir={data_dir}: its tokenizer is not that of {KEY}={path}; prepare the data with that model's "
            "tokenizer"
        )
    elif not differ:
        yield from shape_differences(path, origin.shapes(), model, objective, index.vocab_size)


def shape_differences(
    path: str,
    shapes: Mapping[str, tuple[int, ...]],
    model: ModelConfig,
    objective: ObjectiveConfig,
    vocab_size: int,
) -> Iterator[str]:
    """Yield the first weight that is missing or has another shape, as in a damaged checkpoint.

    A run with the head of a task needs none that predicts tokens.
    """
    token_head = f"{registry.find(model.name).token_head}."
    for name, shape in parameter_shapes(model, vocab_size, len(shapes)).items():
        if isinstance(objective, TaskConfig) and name.startswith(token_head):
            continue
        if shapes.get(name) != shape:
            stored = list(shapes[name]) if name in shapes else "missing"
            yield f"{KEY}={path}: its weights of {name} are {stored}, not {list(shape)}"
            return


def contents(tokenizer: Tokenizer) -> tuple[str, int, int, dict[str, bytes]]:
    """Return what makes a tokenizer: its kind, its size, and the files of its vocabulary, whatever their names say."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return tokenizer.kind, tokenizer.vocab_size, tokenizer.eos, files
