"""Load a trained run in Python: its model, its tokenizer, the data that it was trained on.

from txl_dist.runs.load import load_model, load_tokenizer, open_data
model, checkpoint = load_model("runs/mine")
tokenizer = load_tokenizer("runs/mine", checkpoint)
index = open_data("runs/mine", checkpoint, split="valid")
"""

from pathlib import Path

import torch

from txl_dist.checkpoint.format import Checkpoint, find_checkpoint
from txl_dist.config.identity import EARLIER
from txl_dist.config.schema import ModelChanges, ObjectiveConfig, TaskConfig
from txl_dist.config.sections import changed_model, parse_model, parse_section
from txl_dist.config.types import CheckpointChoice
from txl_dist.data import tokenizers
from txl_dist.data.format import Examples
from txl_dist.data.index import Index
from txl_dist.errors import ConfigError, UserError
from txl_dist.files.atomic import sha256_of_file
from txl_dist.files.parsing import PARSE_ERRORS, describe
from txl_dist.models import registry
from txl_dist.models.base import HeadBuilder, LanguageModel
from txl_dist.models.config import ModelConfig
from txl_dist.models.shapes import parameter_shapes
from txl_dist.objectives.examples import ExampleObjective
from txl_dist.objectives.registry import build_task, head_builder


def load_model(
    run: str, which: CheckpointChoice = None, changes: ModelChanges | None = None, average: bool = False
) -> tuple[LanguageModel, Checkpoint]:
    """Load the model of a run's checkpoint, in evaluation mode, on the GPU where there is one.

    Args:
        run: the run directory.
        which: a step, "best", or None for the latest valid checkpoint.
        changes: keys of the model that are read with other values than in training, such as mem_len.
        average: load the mean of the weights that optimizer.average_from has kept.

    Raises:
        UserError: where the checkpoint cannot be read.
        ConfigError: where the changes are not possible, the average was not kept, or the model predicts no tokens.
    """
    checkpoint = find_checkpoint(run, which)
    if isinstance(objective_of(checkpoint), TaskConfig):
        raise ConfigError([f"run={run}: has learnt a task, and predicts no text; use txl-predict or txl-evaluate"])
    return build_model(run, checkpoint, changes or {}, average), checkpoint


def load_task(
    run: str, which: CheckpointChoice = None, changes: ModelChanges | None = None, average: bool = False
) -> tuple[LanguageModel, ExampleObjective, Checkpoint]:
    """Load the model of a run that has learnt a task, with its objective; arguments and errors as of `load_model`."""
    checkpoint = find_checkpoint(run, which)
    config = objective_of(checkpoint)
    if not isinstance(config, TaskConfig):
        raise ConfigError([f"run={run}: has learnt no task, it predicts text; use txl-generate or txl-score"])
    model = build_model(run, checkpoint, changes or {}, average)
    return model, build_task(config, examples_of(checkpoint), load_tokenizer(run, checkpoint)), checkpoint


def objective_of(checkpoint: Checkpoint) -> ObjectiveConfig:
    """Return what a checkpoint's model was trained for; one of earlier versions, or imported, for predicting text."""
    given = checkpoint.config.get("objective", EARLIER["objective"])
    objective: ObjectiveConfig = parse_section("objective", ObjectiveConfig, given)
    return objective


def examples_of(checkpoint: Checkpoint) -> Examples | None:
    """Return what kind of examples a checkpoint's model was trained on; None: on none.

    Raises:
        UserError: where a checkpoint of a task does not say it.
    """
    given = checkpoint.data.get("examples")
    if given is None and not isinstance(objective_of(checkpoint), TaskConfig):
        return None
    try:
        return Examples.model_validate(given)
    except PARSE_ERRORS as error:
        raise UserError(f"{checkpoint.path}: does not say what its examples are ({describe(error)})") from error


def build_model(run: str, checkpoint: Checkpoint, changes: ModelChanges, average: bool) -> LanguageModel:
    """Build the model of a run's checkpoint, with the head that it was trained with; arguments as of `load_model`."""
    config = changed_model(parse_model(checkpoint.config["model"]), changes)
    vocab_size = checkpoint.data["vocab_size"]
    head = head_builder(objective_of(checkpoint), examples_of(checkpoint))
    problems = list(config.problems())
    missing_average = explain_missing_average(checkpoint) if average else None
    if missing_average:
        problems.append(f"average=true: {run} {missing_average}; leave it out")
    if problems:
        raise ConfigError(problems)
    check_shapes(checkpoint, config, vocab_size, head)
    model = registry.build(config, vocab_size, head=head)
    checkpoint.load_weights(model, average)
    return ready_to_evaluate(model)


def ready_to_evaluate(model: LanguageModel) -> LanguageModel:
    """Put a model on the GPU where there is one, in evaluation mode; on a CPU store it for speed."""
    if torch.cuda.is_available():
        model.cuda()
    else:
        model.store_long_rows()
    return model.eval()


def check_shapes(checkpoint: Checkpoint, config: ModelConfig, vocab_size: int, head: HeadBuilder | None = None) -> None:
    """Compare the shapes of the weights with those of the model, before it is built: a damaged config may be huge.

    Raises:
        UserError: with the first weight that has another shape.
    """
    shapes = checkpoint.shapes("weights")
    for name, shape in parameter_shapes(config, vocab_size, len(shapes), head).items():
        if shapes.get(name) != shape:
            stored = list(shapes.get(name, []))
            raise UserError(f"{checkpoint.path}: its weights of {name} are {stored}, not {list(shape)}")


def explain_missing_average(checkpoint: Checkpoint) -> str | None:
    """Return why a checkpoint holds no averaged weights; None where it holds them."""
    if "imported" in checkpoint.state:
        return "is an imported model, which has none"
    average_from = checkpoint.config["optimizer"].get("average_from")
    if average_from is None:
        return "has kept none, which only a run that was started with optimizer.average_from=STEP does"
    if checkpoint.step < average_from:
        return f"has none at step {checkpoint.step:,}: it keeps them from step {average_from:,} on"
    return None


def load_tokenizer(run: str, checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    """Load the tokenizer in a run directory.

    Raises:
        UserError: where it cannot be read, or its SHA-256 differs from the checkpoint's.
    """
    folder = Path(run) / "tokenizer"
    tokenizer = tokenizers.load(folder)
    for name, sha256 in checkpoint.data.get("tokenizer", {}).items():
        path = folder / name
        if not path.is_file() or sha256_of_file(path) != sha256:
            raise UserError(f"{path}: is damaged; copy it from the dataset's tokenizer/")
    return tokenizer


def open_data(run: str, checkpoint: Checkpoint, split: str, data_dir: str | None = None) -> Index:
    """Open the data that a run was trained on; for an imported model any data with its tokenizer.

    Args:
        split: that the data must have.
        data_dir: where the data are now; None: where the run has read them.

    Raises:
        UserError: where the index cannot be read.
        ConfigError: where the data are gone, are not those of the run, or have no such split.
    """
    tokenizer = Path(run) / "tokenizer"
    location = data_dir or find_data(run, checkpoint)
    if location is None:
        raise ConfigError(
            [f"data_dir: is missing; give data prepared with the tokenizer of the imported model, {tokenizer}"]
        )
    index = Index.open(location)
    vocab_size = checkpoint.data["vocab_size"]
    problems = []
    if "imported" in checkpoint.state:
        if index.tokenizer_files != {path.name: sha256_of_file(path) for path in tokenizer.iterdir()}:
            problems.append(f"data_dir={location}: its tokenizer is not that of the imported model, {tokenizer}")
        learnt = examples_of(checkpoint)
        if learnt is not None and index.examples != learnt:
            examples = "no examples" if index.examples is None else f"examples of {index.examples}"
            problems.append(f"data_dir={location}: holds {examples}, but {run} was imported for those of {learnt}")
    elif index.fingerprint != checkpoint.data["fingerprint"]:
        problems.append(
            f"data_dir={location}: is not what the run {Path(run)} was trained on; give the location of that data"
        )
    if index.vocab_size != vocab_size:
        problems.append(
            f"data_dir={location}: its vocabulary has {index.vocab_size:,} tokens, the run's has {vocab_size:,}"
        )
    if split not in index.splits:
        problems.append(f"split={split}: {location} has {', '.join(index.splits)}")
    if problems:
        raise ConfigError(problems)
    return index


def find_data(run: str, checkpoint: Checkpoint) -> str | None:
    """Return where a run has read its data: the absolute location if something is there, else as it was given.

    Returns:
        None, for an imported model without data.

    Raises:
        ConfigError: where nothing is at either location.
    """
    locations = [checkpoint.data.get("place"), checkpoint.config["data"]["dir"]]
    known = [location for location in locations if location is not None]
    for location in known:
        if "://" in location or Path(location).expanduser().exists():
            return location
    if not known:
        return None
    raise ConfigError([f"data_dir: is missing; the data of {run} are no longer at {known[0]}; give their location now"])
