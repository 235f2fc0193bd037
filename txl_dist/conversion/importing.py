"""Turn a third-party checkpoint into a run of step 0, which has weights and a tokenizer and nothing else."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from txl_dist import __version__
from txl_dist.checkpoint.format import CheckpointWriter
from txl_dist.config.quoting import command_to_paste
from txl_dist.config.schema import ConvertJob
from txl_dist.config.sections import describe_unknown_key, describe_wrong_values
from txl_dist.conversion.import_source import ImportedTask, ImportSource
from txl_dist.conversion.sources import open_import_source
from txl_dist.data.index import Index
from txl_dist.data.tokenizers import Tokenizer
from txl_dist.errors import ConfigError, UserError
from txl_dist.files.atomic import new_folder
from txl_dist.files.lock import Lock
from txl_dist.files.parsing import PARSE_ERRORS, describe, shown
from txl_dist.models import registry
from txl_dist.models.config import ModelConfig


@dataclass(frozen=True)
class ImportedModel:
    """A model that was made elsewhere; its weights have our parameters' names."""

    source: ImportSource
    title: str
    config: ModelConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer


def import_checkpoint(job: ConvertJob, path: Path, run_dir: Path, lock: Lock) -> None:
    """Write the run directory of an imported model.

    Args:
        path: folder or file of the third-party checkpoint.
        lock: of `run_dir`.

    Raises:
        ConfigError: with everything that is wrong with the checkpoint.
    """
    imported = read_model(job, open_import_source(path))
    task = read_task(job, imported)
    if task is not None:
        imported = with_task(imported, task)
    with new_folder(run_dir, lock) as folder:
        imported.tokenizer.save(folder / "tokenizer")
        write_checkpoint(folder, job, imported, task)
    parameters = sum(map(Tensor.numel, imported.weights.values()))
    print(f"{job.run}: {imported.title}, {parameters:,} parameters, tokenizer of {imported.tokenizer.kind}")
    program = "generate" if task is None else "predict"
    print(f"Next: {command_to_paste(f'python -m txl_dist.{program}', run=job.run)}")


def read_model(job: ConvertJob, source: ImportSource) -> ImportedModel:
    """Read a model from a third-party checkpoint.

    Raises:
        ConfigError: with everything that is wrong with it.
    """
    problems: list[str] = []
    with collected(problems):
        tokenizer = find_tokenizer(job, source)
    with collected(problems):
        config = model_config(job, source)
        weights = source.weights(config)
    if problems:
        raise ConfigError(problems)
    return ImportedModel(source, source.title, config, weights, tokenizer)


def read_task(job: ConvertJob, imported: ImportedModel) -> ImportedTask | None:
    """Read what a fine-tuned model has learnt; None where it predicts tokens.

    Raises:
        UserError: where its head cannot be one of ours, or pairs=true is given and it is no classifier.
    """
    read = imported.source.task
    try:
        task = None if read is None else read(imported.config, job.pairs)
    except PARSE_ERRORS as error:
        raise UserError(f"from={job.from_}: is damaged, or not a complete checkpoint ({describe(error)})") from error
    if job.pairs and (task is None or task.examples.kind == "answers"):
        raise ConfigError([f"pairs=true: is for a fine-tuned classifier, and {job.from_} is none; leave it out"])
    return task


def with_task(imported: ImportedModel, task: ImportedTask) -> ImportedModel:
    """Return a model with the head of a task in place of the one that predicts tokens."""
    token_head = f"{registry.find(imported.config.name).token_head}."
    body = {name: value for name, value in imported.weights.items() if not name.startswith(token_head)}
    return replace(imported, title=task.title, weights=body | task.weights)


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Collect a user's mistakes, so that all are reported at once."""
    try:
        yield
    except UserError as error:
        problems += str(error).splitlines()


def find_tokenizer(job: ConvertJob, source: ImportSource) -> Tokenizer:
    """Return the tokenizer of tokenizer_from, or the source's own.

    Raises:
        UserError: where there is none, or its vocabulary has another size than the model's.
    """
    if job.tokenizer_from is not None:
        path = Path(job.tokenizer_from)
        key = f"tokenizer_from={job.tokenizer_from}"
        tokenizer = source.load_vocabulary(path) if path.is_file() else Index.open(job.tokenizer_from).tokenizer()
    elif source.load_tokenizer is not None:
        key = f"from={job.from_}"
        tokenizer = source.load_tokenizer()
    else:
        raise UserError(
            f"tokenizer_from: is missing, because no vocabulary lies beside {job.from_}; give a prepared dataset with "
            f"the same vocabulary of {source.vocab_size:,} tokens, or a vocabulary file"
        )
    if tokenizer.vocab_size != source.vocab_size:
        raise UserError(
            f"{key}: the vocabulary has {tokenizer.vocab_size:,} tokens, but the model {source.vocab_size:,}; "
            "give tokenizer_from=... with the vocabulary that it was trained with"
        )
    return tokenizer


def model_config(job: ConvertJob, source: ImportSource) -> ModelConfig:
    """Combine the hyper-parameters that the source states with those of the job, which come first.

    Raises:
        ConfigError: for those that neither gives, and those that are wrong or do not fit together.
    """
    kind = registry.find(source.hyper_parameters["name"]).Config
    accepted = [*kind.read_otherwise(), *source.also_accepted]
    unknown = [key for key in job.model if key not in accepted]
    if unknown:
        keys = [f"model.{key}" for key in accepted]
        raise ConfigError([describe_unknown_key(f"model.{key}", keys) for key in unknown])
    from_job = {key: value for key, value in job.model.items() if value is not None}
    values = source.hyper_parameters | from_job
    required = [field.name for field in fields(kind) if field.default is MISSING]
    missing = [key for key in required if key not in values]
    if missing:
        raise ConfigError(
            [f"model.{key}: is missing; {job.from_} does not state it: give model.{key}=..." for key in missing]
        )
    try:
        config: ModelConfig = TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise ConfigError(wrong_values(job, kind, from_job, values, error)) from error
    problems = [*config.problems(), *config.vocabulary_problems(source.vocab_size)]
    if problems:
        raise ConfigError(problems)
    return config


def wrong_values(
    job: ConvertJob,
    kind: type[ModelConfig],
    from_job: dict[str, Any],
    values: dict[str, Any],
    error: ValidationError,
) -> list[str]:
    """Describe the first wrong hyper-parameters: by their keys where the job gives them, else by the source."""
    if any(detail["loc"][0] in from_job for detail in error.errors()):
        return list(describe_wrong_values("model", kind, values, error))[:5]
    problems = []
    for detail in error.errors()[:5]:
        key = ".".join(map(str, detail["loc"]))
        problems.append(f"{job.from_}: states {key}={shown(detail['input'])}: {detail['msg']}")
    return problems


def write_checkpoint(run_dir: Path, job: ConvertJob, imported: ImportedModel, task: ImportedTask | None) -> None:
    """Write a checkpoint of step 0 that holds weights alone, and no dataset that the model was trained on."""
    dataset = job.tokenizer_from if job.tokenizer_from and Path(job.tokenizer_from).is_dir() else None
    location = {"place": os.path.abspath(dataset)} if dataset else {}
    objective = {} if task is None else {"objective": task.objective}
    examples = {} if task is None else {"examples": task.examples.model_dump()}
    writer = CheckpointWriter(str(run_dir), step=0, rank=0)
    writer.add("weights", imported.weights)
    writer.commit(
        writer.files,
        state={
            "step": 0,
            "tokens": 0,
            "imported": {"from": str(job.from_), "title": imported.title},
            "written_by": {"txl_dist": __version__, "torch": str(torch.__version__)},
        },
        config={"model": asdict(imported.config), "data": {"dir": dataset, "reset_memory": "never"}} | objective,
        data={"fingerprint": None, "vocab_size": imported.source.vocab_size} | location | examples,
    )
