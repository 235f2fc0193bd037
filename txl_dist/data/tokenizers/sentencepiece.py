"""The pieces of a SentencePiece model."""

import hashlib
import io
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from txl_dist.config.schema import MIN_PIECES
from txl_dist.data.tokenizers.base import BLOCK, EOS, Decoder, Tokenizer, begins_word, bytes_per_character
from txl_dist.data.tokenizers.byte import BytesDecoder
from txl_dist.errors import UserError


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
            raise UserError(vocabulary_problem(cls.kind, MIN_PIECES, vocab_size, str(error))) from error
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

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        tokens: list[int] = []
        spans = []
        position = 0
        for number, part in enumerate(text.split(BLOCK) if self.block else [text]):
            if number:
                tokens.extend(self.block)
                spans += [np.tile([position, position + 1], (len(self.block), 1))]
                position += 1
            for line in io.StringIO(part, newline="\n"):
                ids, line_spans = encode_line_with_offsets(self.pieces, line)
                tokens.extend(ids)
                spans.append(line_spans + position)
                position += len(line)
        return np.array(tokens, self.dtype), np.concatenate([np.empty((0, 2), np.int64), *spans])

    def _encode_lines(self, text: str) -> Iterator[int]:
        # One by one: for a list, SentencePiece starts threads, which costs more than a line does.
        return itertools.chain.from_iterable(map(self.pieces.encode, io.StringIO(text, newline="\n")))

    def decoder(self) -> Decoder:
        return SentencePieceDecoder(self.pieces)

    def token_bytes(self) -> list[bytes] | None:
        has_all_bytes = all(map(self.pieces.is_byte, self._byte_pieces(range(256))))
        if not has_all_bytes or not changes_nothing(self.model):
            return None
        return [self._bytes_of(token) for token in range(self.vocab_size)]

    def word_starts(self) -> np.ndarray:
        return np.array([self._begins_word(token) for token in range(self.vocab_size)])

    def _begins_word(self, token: int) -> bool:
        if self.pieces.is_control(token) or self.pieces.is_unknown(token):
            return True
        piece = self.pieces.id_to_piece(token)
        if self.pieces.is_byte(token):
            byte = byte_of(piece)
            return byte < 128 and begins_word(chr(byte))
        return begins_word(piece)

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


# The numbers of fields in sentencepiece.proto: of SentencePieceText, and of its SentencePiece.
PIECES = 2
ID = 2
BEGIN = 4
END = 5


def encode_line_with_offsets(pieces: sentencepiece.SentencePieceProcessor, line: str) -> tuple[list[int], np.ndarray]:
    """Encode a line; return its tokens, and of each where its characters begin and end in the line: int64 [n, 2].

    SentencePiece counts bytes of the line as it was before its normalisation. Of the byte pieces of a character only
    the last has a length; here all have the whole character.
    """
    tokens: list[int] = []
    spans: list[tuple[int, int]] = []
    for number, piece in protobuf_fields(pieces.encode(line, out_type="serialized_proto")):
        if number == PIECES:
            assert isinstance(piece, bytes)
            fields: dict[int, Any] = dict(protobuf_fields(piece))
            tokens.append(fields[ID])
            spans.append((fields.get(BEGIN, 0), fields.get(END, 0)))
    for index in range(len(spans) - 2, -1, -1):
        begin, end = spans[index]
        if begin == end and begin == spans[index + 1][0] and pieces.is_byte(tokens[index]):
            spans[index] = spans[index + 1]
    positions = np.array(spans, np.int64).reshape(-1, 2)
    if not line.isascii():
        ends = np.cumsum(bytes_per_character(line))
        positions = np.searchsorted(ends, positions, side="right")
    return tokens, positions


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


def vocabulary_problem(kind: str, minimum: int, vocab_size: int, error: str) -> str:
    """Say what would be right where SentencePiece refuses to train, by the text of its error.

    Args:
        kind: of the tokenizer that is trained.
        minimum: the least vocabulary that it may have.
    """
    too_high = re.search(r"too high .*<= (\d+)", error)
    if (too_high and int(too_high[1]) < minimum) or "!sentences_.empty()" in error:
        return (
            f"tokenizer={kind}: the training text is too short for {minimum} pieces, the least there are; "
            "give more text, or use tokenizer=bytes"
        )
    if too_high:
        return f"tokenizer.vocab_size={vocab_size}: the training text has too few pieces; choose {too_high[1]} or less"
    too_low = re.search(r"smaller than required_chars. \d+ vs (\d+)", error)
    if too_low:
        return f"tokenizer.vocab_size={vocab_size}: too few for all characters of the text; choose {too_low[1]} or more"
    return f"tokenizer: SentencePiece cannot be trained on this text ({error}); use tokenizer=bytes"
