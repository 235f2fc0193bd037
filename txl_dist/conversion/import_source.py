"""What the import knows of a third-party checkpoint, whatever its architecture and its format."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from txl_dist.conversion import vocabularies
from txl_dist.data.format import Examples
from txl_dist.data.tokenizers import Tokenizer
from txl_dist.models.config import ModelConfig


@dataclass(frozen=True)
class ImportedTask:
    """What a fine-tuned model has learnt.

    Attributes:
        title: its kind, for people.
        objective: the section of the config.
        examples: what kind of examples it is for.
        weights: the parameters of its head, by our names, in float32.
    """

    title: str
    objective: dict[str, Any]
    examples: Examples
    weights: dict[str, Tensor]


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
        task: reads what the model, as the config that it has here, has learnt, or raises a ConfigError; its argument
            besides says whether a classifier reads pairs of texts. None: it predicts tokens.
    """

    title: str
    hyper_parameters: dict[str, Any]
    vocab_size: int
    weights: Callable[[ModelConfig], dict[str, Tensor]]
    load_tokenizer: Callable[[], Tokenizer] | None
    also_accepted: tuple[str, ...] = ()
    load_vocabulary: Callable[[Path], Tokenizer] = vocabularies.load
    task: Callable[[ModelConfig, bool], ImportedTask] | None = None
