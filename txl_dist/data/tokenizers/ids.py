"""Tokens that stand for no text: the numbers of a sequence themselves."""

from typing import Any, Literal, NamedTuple

import numpy as np

from txl_dist.data.tokenizers.base import Decoder, Tokenizer


class Picture(NamedTuple):
    """Documents that are pictures: rows of pixels from top to bottom, the channels of a pixel side by side."""

    height: int
    width: int
    channels: Literal[1, 3]

    @property
    def size(self) -> int:
        """Return how many numbers a picture has."""
        return self.height * self.width * self.channels


class Sound(NamedTuple):
    """Documents that are sounds of one channel: 8-bit mu-law, `rate` samples per second."""

    rate: int


class IdsTokenizer(Tokenizer):
    """Each number of a sequence is a token; the number behind the largest is `<eos>`.

    Args:
        size: the numbers are 0 .. size - 1.
        end: whether `<eos>` stands behind every document. It is what a document begins with in any case.
        content: what documents are, where they are not mere numbers.
    """

    kind = "ids"

    def __init__(self, size: int, end: bool, content: Picture | Sound | None = None):
        self.vocab_size = size + 1
        self.eos = size
        self.ends_documents = end
        self.content = content

    def encode(self, data: bytes, end: bool) -> np.ndarray:
        """Encode numbers that white space separates.

        Raises:
            ValueError: naming what is not a number of the vocabulary.
        """
        tokens = []
        for number, word in enumerate(data.split(), 1):
            token = int(word) if word.isdigit() and len(word) < 20 else -1
            if not 0 <= token < self.eos:
                shown = word[:40].decode("utf-8", "backslashreplace")
                raise ValueError(f"number {number:,}, {shown!r}, is not one of 0 to {self.eos - 1:,}")
            tokens.append(token)
        if end and self.ends_documents:
            tokens.append(self.eos)
        return np.array(tokens, self.dtype)

    def decoder(self) -> Decoder:
        return IdsDecoder(self.eos)

    def token_bytes(self) -> None:
        return None  # there is no text

    def word_starts(self) -> np.ndarray:
        return np.ones(self.vocab_size, bool)

    def facts(self) -> dict[str, Any]:
        facts = super().facts() | {"end": self.ends_documents}
        if isinstance(self.content, Picture):
            return facts | {"picture": self.content._asdict()}
        return facts if self.content is None else facts | {"sound": self.content._asdict()}

    @classmethod
    def of_facts(cls, facts: dict[str, Any]) -> "IdsTokenizer":
        """Make the tokenizer of the content of a tokenizer.json.

        Raises:
            ValueError, KeyError, TypeError: if it is not one.
        """
        vocab_size = positive(facts["vocab_size"])
        if type(facts["end"]) is not bool:
            raise ValueError("end is neither true nor false")
        content: Picture | Sound | None = None
        if "picture" in facts:
            content = Picture(**facts["picture"])
            if positive(content.channels) not in (1, 3):
                raise ValueError("a picture has 1 or 3 channels")
        elif "sound" in facts:
            content = Sound(**facts["sound"])
        for value in content or ():
            positive(value)
        return cls(vocab_size - 1, facts["end"], content)


class IdsDecoder(Decoder):
    """Writes numbers with spaces between them, and nothing for `<eos>`."""

    def __init__(self, eos: int | None = None):
        self.eos = eos
        self.space = ""

    def feed(self, token: int) -> str:
        if token == self.eos:
            return ""
        text = f"{self.space}{token}"
        self.space = " "
        return text

    def end(self) -> str:
        return ""


def positive(value: Any) -> int:
    """Return a value if it is a positive integer of 32 bits.

    Raises:
        ValueError: if it is not.
    """
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ValueError(f"{value!r:.40} is not a positive number")
    return value
