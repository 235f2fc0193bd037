"""How much text some tokens are: what losses are divided by, so that models of different tokens can be compared."""

from typing import NamedTuple

from txl_dist.data.index import Index
from txl_dist.data.samples import SampleReader


class TextSize(NamedTuple):
    """words: what stands between spaces, and the line ends, which word-level corpora count as words (`<eos>`)."""

    bytes: int
    characters: int
    words: int


def size_of_text(index: Index, name: str, tokens: int) -> TextSize:
    """Of the first `tokens` of a split, put back into text; of a whole split the bytes are those of the original."""
    split, reader, decoder = index.splits[name], SampleReader(index, name), index.tokenizer().decoder()
    text = "".join(decoder.feed(int(token)) for token in reader.tokens(0, tokens)) + decoder.end()
    size = split.bytes if tokens == split.tokens else len(text.encode())
    return TextSize(size, len(text), len(text.split()) + text.count("\n"))
