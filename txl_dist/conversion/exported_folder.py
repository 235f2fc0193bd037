"""What the exported folders of all architectures have in common."""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from txl_dist.data import tokenizers
from txl_dist.data.tokenizers import BytesTokenizer, SentencePieceTokenizer, Tokenizer, WordTokenizer
from txl_dist.errors import UserError
from txl_dist.files.parsing import PARSE_ERRORS, describe, read_json, shown
from txl_dist.models.config import ModelConfig

HUB = Path(__file__).parent / "hub"


class Exporter(ABC):
    """Writes the folder of one architecture's models.

    Attributes:
        readers: the versions of transformers that load it.
        loader: the Python call that does; `{}` is the folder.
    """

    readers: ClassVar[str]
    loader: str

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, vocab_size: int):
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size

    @abstractmethod
    def problems(self) -> Iterator[str]:
        """Yield what cannot be exported, by the keys of the config."""

    def notes(self) -> Iterator[str]:
        """Yield what is not as here in transformers."""
        yield from ()

    @abstractmethod
    def write(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write all files into an empty folder."""


def tokenizers_without_code(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield why a tokenizer cannot be exported with its code."""
    kinds = sorted(path.stem.removeprefix("tokenization_") for path in HUB.glob("tokenization_*.py"))
    if tokenizer.kind not in kinds:
        yield f"tokenizer.name={tokenizer.kind}: is exported with other models only; here it must be one of {kinds}"


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


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load what `write_tokenizer_with_code` has written.

    Raises:
        UserError: where it cannot be read, or is something else.
    """
    path = folder / "tokenizer_config.json"
    try:
        kind = read_json(path)["tokenizer_class"]
    except (OSError, *PARSE_ERRORS) as error:
        raise UserError(f"{path}: names no tokenizer ({describe(error)})") from error
    if kind == "WordTokenizer":
        return WordTokenizer.open(folder / "vocab.txt")
    if kind == "SentencePieceTokenizer":
        return SentencePieceTokenizer.open(folder / "sentencepiece.model")
    if kind == "BytesTokenizer":
        return BytesTokenizer()
    raise UserError(
        f"{path}: tokenizer_class={shown(kind)}: is none that was exported from here; give tokenizer_from=..."
    )


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of generation_config.json: the tokens at which generation begins and ends.

    For words `<eos>` is the line end, and generation does not end there.
    """
    ends = {"eos_token_id": tokenizer.eos} if tokenizer.decode([tokenizer.eos]) == "" else {}
    return {"bos_token_id": tokenizer.eos, "pad_token_id": tokenizer.eos} | ends


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file as people read it."""
    path.write_text(json.dumps(values, indent=2) + "\n")
