"""What every tokenizer does, and how its tokens become text again."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

EOS = "<eos>"
UNK = "<unk>"
BLOCK = "\u2581"  # what SentencePiece writes for a space
PUNCTUATION = frozenset('!"#$%&()*+,-./:;?@[\\]^_`{|}~')  # each a word of its own in XLNet's data_utils.py


class Decoder(Protocol):
    """Turns tokens into text one at a time; a character of several tokens comes out with the last of them."""

    def feed(self, token: int) -> str:
        """Return the text that this token completes; it may be empty."""

    def end(self) -> str:
        """Return the rest: an unfinished character comes out as U+FFFD."""


class Tokenizer(ABC):
    """Turns text into tokens and tokens into text.

    Attributes:
        vocab_size: tokens are 0 .. vocab_size - 1.
        eos: the token that ends a document (words: a line).
        ends_documents: whether `eos` stands in the data; what is read before a document's first token it is anyway.
        lines_are_sentences: whether each line of a text is taken as a sentence, whatever a document is.
    """

    kind: str
    vocab_size: int
    eos: int
    ends_documents = True
    lines_are_sentences = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type in which tokens are stored: little-endian, as narrow as the vocabulary allows."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    @abstractmethod
    def encode(self, data: bytes, end: bool) -> np.ndarray:
        """Encode a piece of a document that ends at a line end, or with the document (`end`).

        The tokens of all pieces, one after the other, are those of the document.

        Returns:
            Tokens [n] of `dtype`.

        Raises:
            UnicodeDecodeError: if the tokenizer reads characters and `data` are not UTF-8.
            ValueError: if it reads numbers and `data` are none of its vocabulary.
        """

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Encode a text, and say of each token which characters it was made of.

        Returns:
            The tokens [n] of `encode(text.encode(), end=False)`, and int64 [n, 2]: the positions in `text` of each
            token's first character and of the one behind its last. The tokens of one character all have its position;
            a token that was made of nothing has two equal ones.

        Raises:
            NotImplementedError: if tokens are not made of text.
        """
        raise NotImplementedError

    @abstractmethod
    def decoder(self) -> Decoder:
        """Make a decoder that takes tokens one at a time."""

    @abstractmethod
    def token_bytes(self) -> list[bytes] | None:
        """Return the bytes of each token, which joined are the text; None if tokens do not give every text back."""

    @abstractmethod
    def word_starts(self) -> np.ndarray:
        """Return of each token whether it begins a word, whatever stands before it: bool [vocab_size].

        White space belongs to the word behind it, and a punctuation mark of ASCII is a word. Where a line ends, its
        white space is all that marks the next line's first word.
        """

    @property
    def specials(self) -> dict[str, int]:
        """Return the special pieces beside `<eos>`, which no text is encoded as: name -> token."""
        return {}

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of some tokens."""
        decoder = self.decoder()
        return "".join(decoder.feed(int(token)) for token in tokens) + decoder.end()

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, and the vocabulary beside it if there is one."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(self.facts(), indent=2) + "\n")

    def facts(self) -> dict[str, Any]:
        """Return the content of tokenizer.json."""
        return {"kind": self.kind, "vocab_size": self.vocab_size, "eos": self.eos}


def bytes_per_character(text: str) -> np.ndarray:
    """Return how many bytes of UTF-8 each character of a text is: int64 [characters]."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)


def begins_word(text: str) -> bool:
    """Return whether a token with this text begins a word, by the rule of `Tokenizer.word_starts`."""
    return text[:1].isspace() or text.startswith(BLOCK) or text in PUNCTUATION
