"""Find the vocabulary of a Reformer folder: pieces, bytes, or what was exported from here."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from txl_dist.conversion import exported_folder, vocabularies
from txl_dist.data.tokenizers import SentencePieceTokenizer, Tokenizer
from txl_dist.errors import UserError
from txl_dist.files.parsing import describe

FILE = "spiece.model"

# google/reformer-enwik8 has no file for its vocabulary: byte b is token b + 2, behind padding and the end of a text.
BYTES = 258
ROWS = [*range(2, BYTES), 1]  # of its tables, for our bytes and <eos>
ROWS_NOTE = "bytes: its token b + 2 is the byte b here, its token 1 is <eos>, and its token 0 (padding) is left out"


def find(folder: Path) -> Callable[[], Tokenizer] | None:
    """Return what loads the vocabulary in a folder; None where there is none."""
    if (folder / FILE).is_file():
        return partial(load, folder / FILE)
    if (folder / "tokenizer_config.json").is_file():
        return partial(exported_folder.load_tokenizer, folder)
    return None


def load(path: Path) -> Tokenizer:
    """Load a SentencePiece model, which ends in `.model`, or a vocabulary of words.

    Raises:
        UserError: where it cannot be read.
    """
    if path.suffix != ".model":
        return vocabularies.load(path)
    try:
        tokenizer = SentencePieceTokenizer(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a SentencePiece model ({describe(error)})") from error
    if tokenizer.eos < 0:
        raise UserError(f"{path}: has no end-of-text token, but ours need one")
    return tokenizer
