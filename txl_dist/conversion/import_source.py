"""What the import knows of a third-party checkpoint, whatever its architecture and its format."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from txl_dist.conversion import vocabularies
from txl_dist.data.tokenizers import Tokenizer
from txl_dist.models.config import ModelConfig


@dataclass(frozen=True)
class ImportSource:
    """A third-party checkpoint, or a folder that was exported from here.

    Attributes:
        title: its kind, for people, and what is not as in the source.
        hyper_parameters: those that it states, by our names; `name` is the architecture.
        vocab_size: as it states, or as its tables have it.
        weights: converts its tensors into the parameters of a config, in float32, or raises a ConfigError.
        load_tokenizer: reads the vocabulary that lies in or beside the source, or raises a UserError; None: there is
            none.
        also_accepted: keys of the model that a user may give in place of the source's, beside those that may be others
            where a trained model is read.
        load_vocabulary: reads a vocabulary file that a user gives.
    """

    title: str
    hyper_parameters: dict[str, Any]
    vocab_size: int
    weights: Callable[[ModelConfig], dict[str, Tensor]]
    load_tokenizer: Callable[[], Tokenizer] | None
    also_accepted: tuple[str, ...] = ()
    load_vocabulary: Callable[[Path], Tokenizer] = vocabularies.load
