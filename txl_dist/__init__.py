"""Distributed training of language models with memory: Transformer-XL and its kin."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from txl_dist.evaluation.trained_model import TrainedModel

__version__ = "0.1.0"  # of the package and of what it writes: pyproject.toml takes it from here


def load(
    path: str,
    checkpoint: int | Literal["best"] | None = None,
    *,
    average: bool = False,
    tgt_len: int | None = None,
    mem_len: int | None = None,
    clamp_len: int | None = None,
    same_length: bool | None = None,
) -> "TrainedModel":
    """Load a trained model with its tokenizer, on the GPU where there is one.

    Args:
        path: a run directory; or a folder or file that `txl-convert` imports, which then is not written anywhere.
        checkpoint: a step of the run, "best" (of the lowest loss on valid), or None: the latest valid one.
        average: load the averaged weights that optimizer.average_from has kept.
        tgt_len, mem_len, clamp_len, same_length: lengths to read with; None: those of training.

    Raises:
        UserError: where nothing can be loaded from there, or the lengths do not fit together.
    """
    from txl_dist.config.schema import LengthsConfig
    from txl_dist.evaluation import trained_model  # with torch: not for --help

    lengths = LengthsConfig(tgt_len, mem_len, clamp_len, same_length)
    return trained_model.load(str(path), checkpoint, average, lengths)
