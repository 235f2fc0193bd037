"""Turn a run into a folder that Hugging Face's transformers loads."""

import json
from pathlib import Path

from txl_dist.checkpoint.format import Checkpoint, find_checkpoint
from txl_dist.config.schema import ConvertJob, TaskConfig
from txl_dist.config.sections import changed_model, parse_model
from txl_dist.conversion.exported_folder import Exporter
from txl_dist.conversion.reformer.exporting import ReformerExporter
from txl_dist.conversion.transformer_xl.exporting import TransformerXLExporter
from txl_dist.conversion.xlnet.exporting import XLNetExporter, XLNetTaskExporter
from txl_dist.data.tokenizers import IdsTokenizer
from txl_dist.errors import ConfigError
from txl_dist.files.atomic import new_folder
from txl_dist.files.lock import Lock
from txl_dist.models.config import ModelConfig
from txl_dist.models.xlnet import XLNetConfig
from txl_dist.runs.load import examples_of, load_tokenizer, objective_of

EXPORTERS: dict[str, type[Exporter]] = {
    "reformer": ReformerExporter,
    "transformer_xl": TransformerXLExporter,
    "xlnet": XLNetExporter,
}


def export_checkpoint(job: ConvertJob, target: Path, lock: Lock) -> None:
    """Write the Hugging Face folder of a run's checkpoint.

    Args:
        lock: of `target`.

    Raises:
        UserError: where the checkpoint is damaged, or its model is not one that can be exported.
    """
    checkpoint = find_checkpoint(job.run, job.checkpoint, contents=True)
    config = changed_model(parse_model(checkpoint.config["model"]), job.model)
    exporter = choose_exporter(job, checkpoint, config)
    if isinstance(exporter.tokenizer, IdsTokenizer):
        raise ConfigError([f"run={job.run}: its tokens are no text, and transformers has no tokenizer for them"])
    problems = [*config.problems(), *exporter.problems()]
    if problems:
        raise ConfigError(problems)
    with new_folder(target, lock) as folder:
        exporter.write(folder, checkpoint.tensors("weights"))
    print(f"{job.to}: step {checkpoint.step:,} of {job.run}, for {exporter.readers}")
    for note in exporter.notes():
        print(f"Note: {note}")
    quoted = json.dumps(job.to, ensure_ascii=False)
    print(f"Next: {exporter.loader.format(quoted)}")


def choose_exporter(job: ConvertJob, checkpoint: Checkpoint, config: ModelConfig) -> Exporter:
    """Return what writes the folder of a checkpoint's model.

    Raises:
        ConfigError: where there is no exported form of it.
    """
    tokenizer = load_tokenizer(job.run, checkpoint)
    vocab_size = checkpoint.data["vocab_size"]
    objective = objective_of(checkpoint)
    if isinstance(objective, TaskConfig):
        examples = examples_of(checkpoint)
        if not isinstance(config, XLNetConfig):
            raise ConfigError(
                [
                    f"run={job.run}: has learnt objective={objective.name} with model={config.name}; such a run is "
                    "exported with model=xlnet only: Transformer-XL and Reformer have no such class here"
                ]
            )
        assert examples is not None
        return XLNetTaskExporter(config, tokenizer, vocab_size, objective, examples)
    if config.name not in EXPORTERS:
        raise ConfigError([f"run={job.run}: holds a model of {config.name}, for which there is no exported form"])
    return EXPORTERS[config.name](config, tokenizer, vocab_size)
