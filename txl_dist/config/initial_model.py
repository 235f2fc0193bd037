"""The model of `model=init_from`: that of the weights that a new run begins with."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from txl_dist.errors import ConfigError, UserError

INIT_FROM = "init_from"  # model.name


def resolve_model(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a composed config in which `model` is that of run.init_from, where model.name says so.

    A run that resumes has its own model already, wherever its first weights came from.

    Raises:
        ConfigError: where nothing says which model that is.
    """
    model = values.get("model")
    if not isinstance(model, Mapping) or model.get("name") != INIT_FROM:
        return dict(values)
    run = values.get("run")
    given = {key: value for key, value in model.items() if key != "name"}
    own, origin = (run.get(key) if isinstance(run, Mapping) else None for key in ("dir", "init_from"))
    try:
        section = (model_of_run(str(own)) if own else None) or model_of_origin(origin, given)
    except UserError as error:
        raise ConfigError(str(error).splitlines()) from error
    return {**values, "model": section | given}


def model_of_run(run_dir: str) -> dict[str, Any] | None:
    """Return the section of a run's model, as its latest checkpoint has it; None where it has none yet."""
    from txl_dist.checkpoint.format import latest, steps  # with torch, as the next

    checkpoint = latest(run_dir) if steps(run_dir) else None
    return None if checkpoint is None else dict(checkpoint.config["model"])


def model_of_origin(path: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the section of the model of a run or of a third-party checkpoint; `given` is what that may not state."""
    from txl_dist.config.schema import ConvertJob
    from txl_dist.conversion.importing import model_config
    from txl_dist.conversion.sources import is_importable, open_import_source

    if path is None:
        raise ConfigError(
            ["run.init_from: is missing, whose model model=init_from is; give it, or another model with its sizes"]
        )
    if is_importable(Path(path)):
        job = ConvertJob(run="none", from_=path, to=None, tokenizer_from=None, checkpoint=None, model={})
        source = open_import_source(Path(path))
        accepted = [key for key in given if key in source.also_accepted or key not in source.hyper_parameters]
        job.model.update({key: given[key] for key in accepted})
        return asdict(model_config(job, source))
    section = model_of_run(path)
    if section is None:
        raise ConfigError([f"run.init_from={path}: is neither a run directory with a checkpoint nor a third-party one"])
    return section
