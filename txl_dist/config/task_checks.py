"""The checks of a training config where something is said of examples: classification and question answering."""

from collections.abc import Iterator

from txl_dist.config.schema import (
    ClassificationConfig,
    DataConfig,
    ModelChanges,
    ObjectiveConfig,
    SpanQAConfig,
    TaskConfig,
    TrackingConfig,
    TrainConfig,
)
from txl_dist.config.sections import changed_model
from txl_dist.data.index import Index
from txl_dist.errors import ConfigError, UserError
from txl_dist.models.config import ModelConfig

MARKS = 3  # around two texts, whatever the tokenizer


def task_fits_the_rest(
    objective: ObjectiveConfig, model: ModelConfig, data: DataConfig, train: TrainConfig, tracking: TrackingConfig
) -> Iterator[str]:
    """Check what a task asks of model and lanes."""
    if not isinstance(objective, TaskConfig):
        return
    given = f"objective={objective.name}"
    if data.reset_memory != "document":
        yield (
            f"data.reset_memory={data.reset_memory}: {given} reads each example from its own beginning; give "
            "data.reset_memory=document"
        )
    if data.on_error != "fail":
        yield f"data.on_error={data.on_error}: {given} cannot leave tokens out; give data.on_error=fail"
    if train.loss != "full":
        yield f"train.loss={train.loss}: is for objective=causal_lm; give train.loss=full"
    if tracking.prompts:
        yield f"tracking.prompts: {given} predicts no text; leave them out"
    if isinstance(objective, SpanQAConfig):
        yield from questions_fit(objective, model)
    elif objective.max_tokens is not None and objective.max_tokens < MARKS + 2:
        yield f"objective.max_tokens={objective.max_tokens}: leaves no text between the marks; give {MARKS + 2} or more"


def questions_fit(objective: SpanQAConfig, model: ModelConfig) -> Iterator[str]:
    """Check that a segment has room for a question and a piece of its passage, and who stands first."""
    fewest = objective.max_question_tokens + MARKS + 1
    if model.tgt_len < fewest:
        yield (
            f"model.tgt_len={model.tgt_len}: holds no question of objective.max_question_tokens="
            f"{objective.max_question_tokens} with its marks and a piece of the passage; give {fewest} or more"
        )
    if objective.passage_first and not model.reads_both_ways:
        yield (
            f"objective.passage_first=true: a model of model.name={model.name} reads from left to right, and would not "
            "know the question when it reads the passage; give false"
        )


def task_has_its_data(
    objective: ObjectiveConfig, model: ModelConfig, evaluation: ModelChanges, data: DataConfig
) -> Iterator[str]:
    """Check that the dataset has the examples of a task, or for a language model none."""
    try:
        index = Index.open(data.dir)
    except UserError:  # data_are_there reports it
        return
    kind = None if index.examples is None else index.examples.kind
    holds = "text to be predicted" if kind is None else f"examples with {kind}"
    if not isinstance(objective, TaskConfig):
        if kind is not None:
            task = "span_qa" if kind == "answers" else "classification"
            yield f"objective={objective.name}: {data.dir} holds {holds}; give objective={task}, or another data.dir"
        return
    is_classification = isinstance(objective, ClassificationConfig)
    if kind is None or is_classification == (kind == "answers"):
        corpus = "corpus=examples" if is_classification else "corpus=squad"
        yield f"objective={objective.name}: {data.dir} holds {holds}; give a data.dir that was prepared with {corpus}"
        return
    examples = index.splits["train"].documents if "train" in index.splits else 0
    if 0 < examples < data.num_lanes:
        yield f"data.num_lanes={data.num_lanes}: more lanes than the split train has examples ({examples:,})"
    if isinstance(objective, ClassificationConfig):
        yield from examples_are_read_whole(objective, model, evaluation, index)


def examples_are_read_whole(
    objective: ClassificationConfig, model: ModelConfig, evaluation: ModelChanges, index: Index
) -> Iterator[str]:
    """Check that examples are no longer than a segment where no memory knows of the segments before."""
    from txl_dist.data.examples import ExampleSource
    from txl_dist.objectives.classification import Classification  # with torch

    assert index.examples is not None
    try:
        read = {"model": model, "evaluation": changed_model(model, evaluation, "evaluation")}
        task = Classification(objective, index.examples, index.tokenizer())
    except (ConfigError, UserError):  # others report it
        return
    for section, config in read.items():
        if config.lookback:
            continue
        for name in index.splits:
            segments = int(task.count_segments(ExampleSource.of_split(index, name), config.tgt_len).max())
            if segments > 1:
                yield (
                    f"{section}.tgt_len={config.tgt_len}: the longest example of {name} needs {segments} segments, and "
                    f"the model remembers none; give {section}.mem_len, or objective.max_tokens={config.tgt_len} to "
                    "cut longer ones"
                )
                return


def language_model_is_planned(objective: ObjectiveConfig, train: TrainConfig) -> Iterator[str]:
    """Check that a plan is asked for a language model, segment by segment."""
    if isinstance(objective, TaskConfig):
        yield f"objective={objective.name}: only the training of language models is planned; leave it out"
    if train.tbptt > 1:
        yield f"train.tbptt={train.tbptt}: only steps of one segment are planned; leave it out"
