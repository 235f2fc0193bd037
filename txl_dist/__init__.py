"""Distributed training of language models with memory: Transformer-XL and its kin."""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from txl_dist.evaluation.trained_model import TrainedModel

__version__ = "0.1.0"  # of the package and of what it writes: pyproject.toml takes it from here


def load(
    path: str,
    checkpoint: int | Literal["best"] | None = None,
    *,
    average: bool = False,
    **changes: Any,
) -> "TrainedModel":
    """Load a trained model with its tokenizer, on the GPU where there is one.

    Args:
        path: a run directory; or a folder or file that `txl-convert` imports, which then is not written anywhere.
        checkpoint: a step of the run, "best" (of the lowest loss on valid), or None: the latest valid one.
        average: load the averaged weights that optimizer.average_from has kept.
        changes: keys of the model that are read with other values than in training, such as mem_len=1600; None: as in
            training.

    Raises:
        UserError: where nothing can be loaded from there, or the model cannot be read so.
    """
    from txl_dist.evaluation import trained_model  # with torch: not for --help

    return trained_model.load(str(path), checkpoint, average, changes)
