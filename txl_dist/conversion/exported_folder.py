"""What the exported folders of all architectures have in common."""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from txl_dist.data import tokenizers
from txl_dist.data.tokenizers import SentencePieceTokenizer, Tokenizer, WordTokenizer
from txl_dist.models.config import ModelConfig

HUB = Path(__file__).parent / "hub"


class Exporter(ABC):
    """Writes the folder of one architecture's models.

    Attributes:
        readers: the versions of transformers that load it.
        loader: the Python call that does; `{}` is the folder.
    """

    readers: ClassVar[str]
    loader: ClassVar[str]

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, vocab_size: int):
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size

    @abstractmethod
    def problems(self) -> Iterator[str]:
        """Yield what cannot be exported, by the keys of the config."""

    @abstractmethod
    def write(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write all files into an empty folder."""


def write_tokenizer_with_code(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer's vocabulary, its code and tokenizer_config.json."""
    name = type(tokenizer).__name__
    values: dict[str, Any] = {
        "tokenizer_class": name,
        "auto_map": {"AutoTokenizer": [f"tokenization_{tokenizer.kind}.{name}", None]},
        "split_special_tokens": True,  # "<eos>" written in a text is text
        "special_tokens_pattern": "bos",  # a text begins as a document does in training
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    eos = tokenizers.EOS
    if isinstance(tokenizer, WordTokenizer):
        (folder / "vocab.txt").write_bytes("".join(f"{word}\n" for word in tokenizer.words).encode())
        values["unk_token"] = tokenizers.UNK
    elif isinstance(tokenizer, SentencePieceTokenizer):
        (folder / "sentencepiece.model").write_bytes(tokenizer.model)
        eos = tokenizer.pieces.id_to_piece(tokenizer.eos)
    write_json(folder / "tokenizer_config.json", values | {"bos_token": eos, "eos_token": eos, "pad_token": eos})
    code = f"tokenization_{tokenizer.kind}.py"
    shutil.copyfile(HUB / code, folder / code)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file as people read it."""
    path.write_text(json.dumps(values, indent=2) + "\n")
