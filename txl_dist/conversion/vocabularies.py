"""The words of other houses, as our `word` tokenizer takes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from txl_dist.conversion import pickles
from txl_dist.data.tokenizers import WordTokenizer
from txl_dist.errors import UserError
from txl_dist.files.parsing import describe, shown

# Of Hugging Face (vocab.*) and of the authors (cache.pt: the whole corpus, pickled), by preference.
FILES = ["vocab.txt", "vocab.bin", "vocab.pkl", "cache.pt"]


def read(path: Path) -> WordTokenizer:
    """A vocabulary file: one word a line, or a pickled vocabulary or corpus.

    Raises:
        UserError: where it cannot be read, or its tokens are not words between white space with `<eos>` and `<unk>`.
    """
    if path.suffix != ".txt":
        return of_pickled(pickles.read(path), path)
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a vocabulary ({error})") from error
    return WordTokenizer.checked([line.split()[0] for line in lines if line.split()], path)


def of_pickled(found: Any, path: Path) -> WordTokenizer:
    """What the authors, NVIDIA and Hugging Face pickle: an object or a dict with idx2sym, perhaps within a corpus."""
    facts = found if isinstance(found, Mapping) else getattr(found, "__dict__", {})
    facts = getattr(facts.get("vocab"), "__dict__", facts)
    words = facts.get("idx2sym")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{path}: holds no vocabulary of words (no idx2sym); give tokenizer_from=DATASET_DIR")
    lower_case = facts.get("lower_case")
    if not (lower_case is None or lower_case is False) or facts.get("delimiter") is not None:
        raise UserError(
            f"{path}: its words were made with lower_case={shown(lower_case)} and "
            f"delimiter={shown(facts.get('delimiter'))}, and ours of text as it is, between white space; "
            "give tokenizer_from=DATASET_DIR"
        )
    try:
        "".join(set(words)).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}: a word in it is not text ({describe(error)})") from error
    return WordTokenizer.checked(words, path)
