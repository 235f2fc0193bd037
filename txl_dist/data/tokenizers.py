"""From text to token numbers and back: bytes, words, SentencePiece.

Every tokenizer has a token `<eos>` that ends a document (with words: a line, as in the Penn Treebank and WikiText-103
experiments of the Transformer-XL paper). They are saved as JSON, text and SentencePiece's own format; no pickle.
"""

import codecs
import hashlib
import io
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece

from txl_dist.config.schema import MIN_PIECES
from txl_dist.errors import UserError

EOS = "<eos>"
UNK = "<unk>"
BLOCK = "\u2581"  # what SentencePiece writes for a space


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
    """

    kind: str
    vocab_size: int
    eos: int

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
        """

    @abstractmethod
    def decoder(self) -> Decoder:
        """Make a decoder that takes tokens one at a time."""

    @abstractmethod
    def token_bytes(self) -> list[bytes] | None:
        """Return the bytes of each token, which joined are the text; None if tokens do not give every text back."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of some tokens."""
        decoder = self.decoder()
        return "".join(decoder.feed(int(token)) for token in tokens) + decoder.end()

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, and the vocabulary beside it if there is one."""
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"kind": self.kind, "vocab_size": self.vocab_size, "eos": self.eos}
        (folder / "tokenizer.json").write_text(json.dumps(facts, indent=2) + "\n")


# -------------------------------------------------------------------------------------------------------- bytes


class BytesTokenizer(Tokenizer):
    """One token per byte, of any bytes; 256 is `<eos>`."""

    kind = "bytes"
    vocab_size = 257
    eos = 256

    def encode(self, data: bytes, end: bool) -> np.ndarray:
        tokens = np.full(len(data) + end, self.eos, self.dtype)
        tokens[: len(data)] = np.frombuffer(data, np.uint8)
        return tokens

    def decoder(self) -> Decoder:
        return BytesDecoder()

    def token_bytes(self) -> list[bytes]:
        return [*(bytes([byte]) for byte in range(256)), b""]


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


# -------------------------------------------------------------------------------------------------------- words


class WordTokenizer(Tokenizer):
    """One token per word, as white space separates them; `<eos>` after every line, `<unk>` for an unknown word.

    `<unk>` written in the text is that token, too; `<eos>` written in the text is always an unknown word.

    Args:
        words: the vocabulary in the order of the tokens; `<eos>` and `<unk>` are among them.
    """

    kind = "word"

    def __init__(self, words: list[str]):
        self.words = words
        self.vocab_size = len(words)
        self.eos = words.index(EOS)
        self.unk = words.index(UNK)
        self.ids = {word: token for token, word in enumerate(words) if token != self.eos}

    @classmethod
    def train(cls, counts: Counter[str], vocab_size: int | None, min_count: int) -> "WordTokenizer":
        """Make a vocabulary in the order of the paper's code: `<eos>`, then the words by frequency.

        Words of equal count keep the order of `counts`. `<unk>` is one of the words; if the text has none, it comes
        first. There are at most `vocab_size` tokens in all.
        """
        known = [word for word, count in counts.most_common() if count >= min_count and word != EOS]
        size = vocab_size and vocab_size - 1
        if UNK not in known[:size]:
            known.insert(0, UNK)
        return cls([EOS, *known[:size]])

    @staticmethod
    def read_counts(path: Path) -> Counter[str]:
        """Read a published vocabulary with "word count" in each line.

        So Jozefowicz et al. (2016) published the words of the 1-billion-word benchmark: `<S>`, around every sentence,
        is `<eos>`, and `<UNK>` is `<unk>`.

        Raises:
            UserError: if it is another kind of file.
        """
        counts: Counter[str] = Counter()
        names = {"<S>": EOS, "<UNK>": UNK}
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                word, count = line.decode().split()
                counts[names.get(word, word)] = int(count)
            except ValueError as error:
                raise UserError(f"{path}: line {number} is not a word and its count; fetch it again") from error
        if EOS not in counts or UNK not in counts:
            raise UserError(f"{path}: has no <S> or no <UNK>; it is not the published vocabulary; fetch it again")
        return counts

    @classmethod
    def open(cls, path: Path) -> "WordTokenizer":
        """Read a vocabulary file: one word per line, in the order of the tokens.

        A byte order mark and the line ends of Windows are left out.

        Raises:
            UserError: if it cannot be read, or is not a vocabulary of words with `<eos>` and `<unk>`.
        """
        try:
            lines = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
        except OSError as error:
            raise UserError(f"{path}: cannot be read as a vocabulary ({error.strerror}); give another file") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: cannot be read as a vocabulary ({error}); convert it (iconv) to UTF-8") from error
        words = [line.removesuffix("\r") for line in lines]
        for number, word in enumerate(words, 1):
            if word.split() != [word]:
                raise UserError(f"{path}: line {number} is not one word, but {word[:40]!r}; give one word per line")
        return cls.checked(words, path)

    @classmethod
    def checked(cls, words: list[str], path: Path) -> "WordTokenizer":
        """Make a tokenizer of the words of a file from elsewhere.

        Raises:
            UserError: if they are not a vocabulary of words with `<eos>` and `<unk>`.
        """
        problems = [f"it has no {word}" for word in (EOS, UNK) if word not in words]
        if len(set(words)) < len(words):
            problems.append("a word is in it twice")
        if any(word.split() != [word] for word in set(words)):
            problems.append("a word in it is empty or has white space")
        if problems:
            raise UserError(f"{path}: is not a vocabulary of the word tokenizer: {', '.join(problems)}")
        return cls(words)

    def encode(self, data: bytes, end: bool) -> np.ndarray:
        tokens: list[int] = []
        unknown = itertools.repeat(self.unk)
        lines = data.decode().split("\n")
        rest = lines.pop()
        for line in lines:
            tokens.extend(map(self.ids.get, line.split(), unknown))
            tokens.append(self.eos)
        tokens.extend(map(self.ids.get, rest.split(), unknown))
        if rest and end:
            tokens.append(self.eos)
        return np.array(tokens, self.dtype)

    def decoder(self) -> Decoder:
        return WordDecoder(self)

    def token_bytes(self) -> None:
        return None  # white space and unknown words are lost

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / "vocab.txt").write_bytes("".join(f"{word}\n" for word in self.words).encode())


class WordDecoder(Decoder):
    """Puts a space between the words of a line."""

    def __init__(self, tokenizer: WordTokenizer):
        self.tokenizer = tokenizer
        self.space = ""

    def feed(self, token: int) -> str:
        if token == self.tokenizer.eos:
            self.space = ""
            return "\n"
        text = self.space + self.tokenizer.words[token]
        self.space = " "
        return text

    def end(self) -> str:
        return ""


# ------------------------------------------------------------------------------------------------ sentencepiece


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, applied line by line, line ends included.

    A model trained here loses nothing: no normalization, bytes for a character that has no piece, a piece of its own
    for the line end, and bytes for U+2581, which SentencePiece itself writes for a space. A given model is used as it
    is: it may change white space and rare characters.

    Args:
        model: the content of a .model file.

    Raises:
        ValueError: if `model` is not one.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.pieces = processor(model)
        self.vocab_size = self.pieces.get_piece_size()
        self.eos = self.pieces.eos_id()
        # The tokens of U+2581, if the model has a piece for each byte; else it is encoded as a space.
        block = self._byte_pieces(BLOCK.encode())
        self.block = block if all(map(self.pieces.is_byte, block)) else []

    @classmethod
    def train(cls, lines: Iterable[str], vocab_size: int, model_type: str) -> "SentencePieceTokenizer":
        """Train on lines of text. The result depends on nothing else.

        Raises:
            UserError: if the text allows no vocabulary of this size; it names a size that would work.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=sentences(lines),
                model_writer=model,
                model_type=model_type,
                vocab_size=vocab_size,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,  # an indentation is one token
                user_defined_symbols=["\n"],
                unk_id=0,
                eos_id=1,
                eos_piece=EOS,
                bos_id=-1,
                pad_id=-1,
                num_threads=4,  # a constant, because each thread sums its part: the rounding depends on their number
                minloglevel=3,
            )
        except RuntimeError as error:
            raise UserError(vocabulary_problem(vocab_size, str(error))) from error
        return cls(model.getvalue())

    @classmethod
    def open(cls, path: Path) -> "SentencePieceTokenizer":
        """Read a .model file.

        Raises:
            UserError: if it is not a SentencePiece model, or one without a token that ends a text.
        """
        try:
            tokenizer = cls(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(
                f"tokenizer.model={path}: cannot be read as a SentencePiece model ({error}); give another file"
            ) from error
        if tokenizer.eos < 0:
            raise UserError(f"tokenizer.model={path}: the model has no end-of-text token; train it with an eos_id >= 0")
        return tokenizer

    def encode(self, data: bytes, end: bool) -> np.ndarray:
        tokens: list[int] = []
        first, *others = data.decode().split(BLOCK) if self.block else [data.decode()]
        tokens.extend(self._encode_lines(first))
        for text in others:
            tokens.extend(self.block)
            tokens.extend(self._encode_lines(text))
        return np.array(tokens + [self.eos] * end, self.dtype)

    def _encode_lines(self, text: str) -> Iterator[int]:
        lines = list(io.StringIO(text, newline="\n"))
        return itertools.chain.from_iterable(self.pieces.encode(lines, num_threads=1))

    def decoder(self) -> Decoder:
        return SentencePieceDecoder(self.pieces)

    def token_bytes(self) -> list[bytes] | None:
        has_all_bytes = all(map(self.pieces.is_byte, self._byte_pieces(range(256))))
        if not has_all_bytes or not changes_nothing(self.model):
            return None
        return [self._bytes_of(token) for token in range(self.vocab_size)]

    def _bytes_of(self, token: int) -> bytes:
        piece = self.pieces.id_to_piece(token)
        if self.pieces.is_byte(token):
            return bytes([byte_of(piece)])
        return b"" if self.pieces.is_control(token) else piece.replace(BLOCK, " ").encode()

    def _byte_pieces(self, values: Iterable[int]) -> list[int]:
        return [self.pieces.piece_to_id(f"<0x{byte:02X}>") for byte in values]

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / "sentencepiece.model").write_bytes(self.model)


class SentencePieceDecoder(Decoder):
    """Joins the pieces' texts; consecutive byte pieces are decoded together as UTF-8."""

    def __init__(self, pieces: sentencepiece.SentencePieceProcessor):
        self.pieces = pieces
        self.bytes = BytesDecoder()

    def feed(self, token: int) -> str:
        if self.pieces.is_byte(token):
            return self.bytes.feed(byte_of(self.pieces.id_to_piece(token)))
        if self.pieces.is_control(token) or self.pieces.is_unknown(token):
            return self.end() + str(self.pieces.decode([token]))
        return self.end() + str(self.pieces.id_to_piece(token)).replace(BLOCK, " ")

    def end(self) -> str:
        return self.bytes.end()


def byte_of(piece: str) -> int:
    """Return the byte that a piece such as "<0xE2>" stands for."""
    return int(piece[3:5], 16)


def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece model.

    Raises:
        ValueError: if it is damaged, or something else.
    """
    if not model:
        raise ValueError("it is empty")
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces.id_to_piece(list(range(pieces.get_piece_size())))  # fails if one is not UTF-8
        pieces.encode(["a"])
    except (RuntimeError, LookupError, UnicodeDecodeError) as error:
        raise ValueError("it is damaged, or is something else") from error
    return pieces


# The numbers of fields in sentencepiece_model.proto: of ModelProto ...
TRAINER = 2
NORMALIZER = 3
# ... of its TrainerSpec, with two values of its model type ...
MODEL_TYPE = 3
UNIGRAM = 1
WORD = 3
BYTE_FALLBACK = 35
# ... and of its NormalizerSpec.
CHARSMAP = 2
DUMMY_PREFIX = 3
EXTRA_WHITESPACES = 4
ESCAPE = 5


def changes_nothing(model: bytes) -> bool:
    """Return whether a SentencePiece model takes every text as it is, its rare characters as bytes.

    It does if it maps no character to another, adds no space in front, keeps every space (which it writes as U+2581)
    and falls back to bytes; models of type `word` lose spaces even so.
    """
    parts: dict[int, bytes] = defaultdict(bytes)
    for number, value in protobuf_fields(model):
        if isinstance(value, bytes) and number in (TRAINER, NORMALIZER):
            parts[number] += value  # a message may come in several parts, one after the other
    trainer = dict(protobuf_fields(parts[TRAINER]))
    normalizer = dict(protobuf_fields(parts[NORMALIZER]))
    rules = [normalizer.get(number, 1) for number in (DUMMY_PREFIX, EXTRA_WHITESPACES, ESCAPE)]
    keeps_spaces = rules == [0, 0, 1] and trainer.get(MODEL_TYPE, UNIGRAM) != WORD
    return keeps_spaces and not normalizer.get(CHARSMAP) and trainer.get(BYTE_FALLBACK) == 1


def protobuf_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields (number, value) of a message in protobuf's wire format; numbers of fixed width come as bytes."""
    stream = io.BytesIO(message)
    while stream.tell() < len(message):
        key = varint(stream)
        number = key >> 3
        wire_type = key & 7
        if wire_type == 0:
            yield number, varint(stream)
        elif wire_type == 1:
            yield number, stream.read(8)
        elif wire_type == 2:
            yield number, stream.read(varint(stream))
        elif wire_type == 5:
            yield number, stream.read(4)
        else:
            raise UserError(
                f"the SentencePiece model is damaged (a field of the unknown type {wire_type}); give another"
            )


def varint(stream: io.BytesIO) -> int:
    """Read a number in protobuf's encoding: 7 bits per byte, the lowest first."""
    value = 0
    shift = 0
    while True:
        byte = stream.read(1)[0]
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value


def sentences(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines without their ends, cut into stretches: SentencePiece ignores those of more than 4,192 bytes."""
    for line in lines:
        text = line.rstrip("\n")
        yield from (text[start : start + 1000] for start in range(0, len(text), 1000))


def vocabulary_problem(vocab_size: int, error: str) -> str:
    """Say what would be right where SentencePiece refuses to train, by the text of its error."""
    too_high = re.search(r"too high .*<= (\d+)", error)
    if (too_high and int(too_high[1]) < MIN_PIECES) or "!sentences_.empty()" in error:
        return (
            f"tokenizer=sentencepiece: the training text is too short for {MIN_PIECES} pieces, the least there are; "
            "give more text, or use tokenizer=bytes"
        )
    if too_high:
        return f"tokenizer.vocab_size={vocab_size}: the training text has too few pieces; choose {too_high[1]} or less"
    too_low = re.search(r"smaller than required_chars. \d+ vs (\d+)", error)
    if too_low:
        return f"tokenizer.vocab_size={vocab_size}: too few for all characters of the text; choose {too_low[1]} or more"
    return f"tokenizer: SentencePiece cannot be trained on this text ({error}); use tokenizer=bytes"


# --------------------------------------------------------------------------------------------------------- load


def load(folder: Path) -> Tokenizer:
    """Load a tokenizer from the folder to which `Tokenizer.save` wrote it.

    Raises:
        UserError: if it is not there, or is damaged.
    """
    path = folder / "tokenizer.json"
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        tokenizer: Tokenizer
        if facts["kind"] == "bytes":
            tokenizer = BytesTokenizer()
        elif facts["kind"] == "word":
            tokenizer = WordTokenizer((folder / "vocab.txt").read_bytes().decode().split("\n")[:-1])
        elif facts["kind"] == "sentencepiece":
            tokenizer = SentencePieceTokenizer((folder / "sentencepiece.model").read_bytes())
        else:
            raise UserError(f"{path}: kind {facts['kind']!r} is unknown here; it is bytes, word or sentencepiece")
        if (tokenizer.vocab_size, tokenizer.eos) != (facts["vocab_size"], facts["eos"]):
            raise UserError(f"{path}: its vocabulary has {tokenizer.vocab_size} tokens, not {facts['vocab_size']}")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder}: holds no tokenizer that can be read ({error})") from error
    return tokenizer
