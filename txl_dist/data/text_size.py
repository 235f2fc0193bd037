"""How much text some tokens are: what losses are divided by, so that models of different tokens can be compared."""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from txl_dist.data.index import Index, Split
from txl_dist.data.samples import SampleReader
from txl_dist.data.tokenizers import WordTokenizer


class TextSize(NamedTuple):
    """Sizes of a text as it was before a tokenizer read it; None: not known.

    words: what stands between white space, and the line ends, which word-level corpora count as words (`<eos>`).
    """

    bytes: int | None
    characters: int | None
    words: int | None


def size_of_documents(
    documents: Sequence[bytes], midword: int = 0, cut_off: bool = False
) -> tuple[int, int | None, int | None]:
    """Count the bytes, characters and words of documents or pieces of them; None where they are not UTF-8.

    Args:
        midword: how many of them begin within a word that is counted already.
        cut_off: whether the last one may end within a character, which then counts as one.
    """
    gaps = len(documents) - 1
    data = b" ".join(documents)  # so that no word goes on from one to the next
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(data, final=not cut_off)
    except UnicodeDecodeError:
        return len(data) - gaps, None, None
    if decoder.getstate()[0]:
        text += "\ufffd"
    words = len(text.split()) + text.count("\n") - midword
    return len(data) - gaps, len(text) - gaps, words


def size_of_text(index: Index, name: str, tokens: int) -> TextSize:
    """Return the size of the text of which the first `tokens` of a split were made.

    `prepare` counts the text of a whole split. That of a part, and of a split prepared before it did, is counted here
    where the tokenizer gives the text back exactly; a word or character that is cut off counts as one.
    """
    split, tokenizer = index.splits[name], index.tokenizer()
    whole = tokens == split.tokens
    if whole and split.words is not None:
        return TextSize(split.bytes, split.characters, split.words)
    spelling = tokenizer.spelling()
    if spelling is None:
        words = number_of_words(split, tokens) if isinstance(tokenizer, WordTokenizer) else None
        return TextSize(split.bytes if whole else None, None, words)
    stream = SampleReader(index, name).tokens(0, tokens)
    ends = split.document_starts[1:].astype(np.int64)
    documents = np.split(stream, ends[ends < tokens])
    texts = [b"".join(map(spelling.__getitem__, document.tolist())) for document in documents]
    return TextSize(*size_of_documents(texts, cut_off=not whole))


def number_of_words(split: Split, tokens: int) -> int | None:
    """Return how many words the first `tokens` of a split are, where each token is one.

    The `<eos>` behind a document whose last line has no end is no word: how many those are is known only where every
    document of the split has one, or none.
    """
    ended = int(np.searchsorted(split.document_starts[1:], tokens, side="right"))
    without_line_end = None if split.words is None else split.tokens - split.words
    if ended == 0 or without_line_end == 0:
        return tokens
    return tokens - ended if without_line_end == split.documents else None
