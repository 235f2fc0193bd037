"""The architectures that model.name can name: those of this folder, and those that other packages bring along.

Another package names its models in the entry-point group `txl_dist.models` of its pyproject.toml:

    [project.entry-points."txl_dist.models"]
    mine = "my_package.my_module:MyModel"

A module is imported when its architecture is asked for, not before: with it comes torch.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from txl_dist.models.config import ModelConfig

if TYPE_CHECKING:
    from txl_dist.models.base import HeadBuilder, LanguageModel, Runtime

GROUP = "txl_dist.models"
OURS = {
    "transformer_xl": EntryPoint("transformer_xl", "txl_dist.models.transformer_xl:TransformerXL", GROUP),
    "reformer": EntryPoint("reformer", "txl_dist.models.reformer:Reformer", GROUP),
    "gated_delta_net": EntryPoint("gated_delta_net", "txl_dist.models.gated_delta_net:GatedDeltaNet", GROUP),
    "xlnet": EntryPoint("xlnet", "txl_dist.models.xlnet:XLNet", GROUP),
}


def names() -> list[str]:
    """List what model.name can be."""
    return sorted({*OURS, *entry_points(group=GROUP).names})


def find(name: str) -> "type[LanguageModel]":
    """Return the class of an architecture; a name of ours means ours.

    Raises:
        LookupError: where none of this name is installed, or its package cannot be imported.
    """
    entry = OURS.get(name) or next(iter(entry_points(group=GROUP, name=name)), None)
    if entry is None:
        raise LookupError(f"is not an architecture that is installed here; these are: {', '.join(names())}")
    try:
        model: type[LanguageModel] = entry.load()
    except (ImportError, AttributeError) as error:
        raise LookupError(f"{entry.value} cannot be imported: {error}") from error
    return model


def is_installed(name: object) -> bool:
    """Return whether an architecture can be found."""
    try:
        find(str(name))
    except LookupError:
        return False
    return True


def build(
    config: ModelConfig,
    vocab_size: int,
    runtime: "Runtime | None" = None,
    head: "HeadBuilder | None" = None,
) -> "LanguageModel":
    """Build a model on the CPU, with weights drawn from torch's generator.

    Args:
        head: builds the head of a task, which takes the place of the one that predicts tokens.
    """
    from txl_dist.models.base import DEFAULT_RUNTIME

    model = find(config.name)(config, vocab_size, runtime or DEFAULT_RUNTIME)
    if head is not None:
        model.replace_head(head(model))
    return model
