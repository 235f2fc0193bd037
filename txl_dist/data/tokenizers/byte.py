"""One token per byte."""

import codecs

import numpy as np

from txl_dist.data.tokenizers.base import Decoder, Tokenizer, begins_word, bytes_per_character


class BytesTokenizer(Tokenizer):
    """One token per byte, of any bytes; 256 is `<eos>`."""

    kind = "bytes"
    vocab_size = 257
    eos = 256

    def encode(self, data: bytes, end: bool) -> np.ndarray:
        tokens = np.full(len(data) + end, self.eos, self.dtype)
        tokens[: len(data)] = np.frombuffer(data, np.uint8)
        return tokens

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        characters = np.arange(len(text)).repeat(bytes_per_character(text))
        return self.encode(text.encode(), False), np.stack([characters, characters + 1], axis=1)

    def decoder(self) -> Decoder:
        return BytesDecoder()

    def token_bytes(self) -> list[bytes]:
        return [*(bytes([byte]) for byte in range(256)), b""]

    def word_starts(self) -> np.ndarray:
        return np.array([byte < 128 and begins_word(chr(byte)) for byte in range(256)] + [True])


class BytesDecoder(Decoder):
    """Decodes UTF-8 byte by byte."""

    def __init__(self) -> None:
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        return self.utf8.decode(bytes([token])) if token < 256 else self.end()

    def end(self) -> str:
        rest = self.utf8.decode(b"", final=True)
        self.utf8.reset()
        return rest
