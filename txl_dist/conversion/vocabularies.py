"""Load third-party vocabularies of words for our `word` tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from txl_dist.conversion import pickles
from txl_dist.data.tokenizers import WordTokenizer
from txl_dist.errors import UserError
from txl_dist.files.parsing import describe, shown

# Files of Hugging Face (vocab.*) and of the authors (cache.pt: the whole corpus, pickled), by preference.
FILES = ["vocab.txt", "vocab.bin", "vocab.pkl", "cache.pt"]


def load(path: Path) -> WordTokenizer:
    """Load a vocabulary file: one word per line, or a pickled vocabulary or corpus.

    Raises:
        UserError: where it cannot be read, or its tokens are not words between white space with `<eos>` and `<unk>`.
    """
    if path.suffix != ".txt":
        return from_pickle(pickles.load(path), path)
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a vocabulary ({error})") from error
    return WordTokenizer.checked([line.split()[0] for line in lines if line.split()], path)


def from_pickle(content: Any, path: Path) -> WordTokenizer:
    """Make a tokenizer of what the authors, NVIDIA and Hugging Face pickle.

    Args:
        content: an object or a dict with idx2sym, the list of words; or a corpus with such a `vocab`.

    Raises:
        UserError: where it is something else, or its words are not those that white space separates.
    """
    attributes = content if isinstance(content, Mapping) else getattr(content, "__dict__", {})
    attributes = getattr(attributes.get("vocab"), "__dict__", attributes)
    words = attributes.get("idx2sym")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{path}: holds no vocabulary of words (no idx2sym); give tokenizer_from=DATASET_DIR")
    lower_case = attributes.get("lower_case")
    delimiter = attributes.get("delimiter")
    if not (lower_case is None or lower_case is False) or delimiter is not None:
        raise UserError(
            f"{path}: its words were made with lower_case={shown(lower_case)} and delimiter={shown(delimiter)}, but "
            "ours are the text as it is, between white space; give tokenizer_from=DATASET_DIR"
        )
    try:
        "".join(set(words)).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}: a word in it is not valid Unicode ({describe(error)})") from error
    return WordTokenizer.checked(words, path)
