"""The size of the text that tokens were made of: losses are divided by it to compare models of different tokens."""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from txl_dist.data.index import Index, Split
from txl_dist.data.samples import SampleReader
from txl_dist.data.tokenizers import WordTokenizer


class TextSize(NamedTuple):
    """Sizes of a text as it was before a tokenizer read it; None: not known.

    Attributes:
        words: runs of characters between white space, and the line ends, which word-level corpora count as words
            (`<eos>`).
    """

    bytes: int | None
    characters: int | None
    words: int | None

    def plus(self, other: "TextSize") -> "TextSize":
        """Return the size of both texts together; what is not known of one is not known of both."""
        return TextSize(
            add_known(self.bytes, other.bytes),
            add_known(self.characters, other.characters),
            add_known(self.words, other.words),
        )


def add_known(one: int | None, other: int | None) -> int | None:
    """Add two counts; None if one is not known."""
    return None if one is None or other is None else one + other


def count_text(documents: Sequence[bytes], midword: int = 0, cut_off: bool = False) -> TextSize:
    """Count the bytes, characters and words of documents or pieces of them; if they are not UTF-8, the bytes alone.

    Args:
        midword: how many of them begin within a word that is counted already.
        cut_off: whether the last one may end within a character, which then counts as one.
    """
    gaps = len(documents) - 1
    data = b" ".join(documents)  # a space, so that no word continues from one to the next
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(data, final=not cut_off)
    except UnicodeDecodeError:
        return TextSize(len(data) - gaps, None, None)
    if decoder.getstate()[0]:
        text += "\ufffd"
    words = len(text.split()) + text.count("\n") - midword
    return TextSize(len(data) - gaps, len(text) - gaps, words)


def size_of_text(index: Index, name: str, tokens: int) -> TextSize:
    """Return the size of the text that the first `tokens` of a split were made of.

    `prepare` counts the text of each split. That of a part, and of a split prepared before it did, is counted here if
    the tokenizer gives the text back exactly; a word or character that is cut off counts as one.
    """
    split = index.splits[name]
    tokenizer = index.tokenizer()
    is_all = tokens == split.tokens
    if is_all and split.words is not None:
        return TextSize(split.bytes, split.characters, split.words)
    token_bytes = tokenizer.token_bytes()
    if token_bytes is None:
        words = number_of_words(split, tokens) if isinstance(tokenizer, WordTokenizer) else None
        return TextSize(split.bytes if is_all else None, None, words)
    stream = SampleReader(index, name).tokens(0, tokens)
    ends = split.document_starts[1:].astype(np.int64)
    documents = np.split(stream, ends[ends < tokens])
    texts = [b"".join(map(token_bytes.__getitem__, document.tolist())) for document in documents]
    return count_text(texts, cut_off=not is_all)


def number_of_dimensions(index: Index, name: str, tokens: int) -> int | None:
    """Return how many of the first `tokens` of a split are numbers of sequences, not `<eos>`; None if they are text."""
    split = index.splits[name]
    if split.bytes is not None:
        return None
    ended = int(np.searchsorted(split.document_starts[1:], tokens, side="right"))
    return tokens - ended * index.tokenizer().ends_documents


def number_of_words(split: Split, tokens: int) -> int | None:
    """Return how many words the first `tokens` of a split are, if each token is one.

    The `<eos>` behind a document whose last line has no end is not a word. How many of those there are is known only
    if every document of the split has one, or none.
    """
    ended = int(np.searchsorted(split.document_starts[1:], tokens, side="right"))
    without_line_end = None if split.words is None else split.tokens - split.words
    if ended == 0 or without_line_end == 0:
        return tokens
    return tokens - ended if without_line_end == split.documents else None
