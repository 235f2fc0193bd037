"""XLNet's way with SentencePiece: its special pieces, its normalisation, its rule for a comma behind a digit.

The rules are those of prepro_utils.py of the authors' code (Yang et al. 2019, github.com/zihangdai/xlnet).
"""

import hashlib
import io
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from txl_dist.config.schema import MIN_XLNET_PIECES
from txl_dist.data.tokenizers.base import BLOCK, Decoder, Tokenizer, begins_word
from txl_dist.data.tokenizers.sentencepiece import (
    SentencePieceDecoder,
    encode_line_with_offsets,
    processor,
    sentences,
    vocabulary_problem,
)
from txl_dist.errors import UserError

MODEL_FILE = "spiece.model"  # in a saved tokenizer, and in the published models
SPECIALS = {
    name: token
    for token, name in enumerate(["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"])
}
UNK = SPECIALS["<unk>"]
EOD = SPECIALS["<eod>"]
IN_TEXT = "<eop>"  # the one special piece that a text may hold: the authors' mark of a paragraph's end
USER_DEFINED = [IN_TEXT, *'.()"-–£€']  # pieces of the published model that are never part of a longer one

NORMALISED = re.compile(r"\s+|``|''|\S")  # what `normalise` replaces, piece by piece


class XLNetTokenizer(Tokenizer):
    """A SentencePiece model with XLNet's special pieces, applied to each line by itself.

    A line is a sentence. It is normalised first, so that white space, accents, line ends and, with `lower`, capitals
    are lost; a blank line has no token. `<eod>` ends a document. Special pieces written in a text are text, but `<eop>`
    is that piece, as in the authors' code.

    Args:
        model: the content of a .model file.
        lower: whether text is lower-cased; the published vocabulary is not.

    Raises:
        ValueError: if `model` is not one, or has not all special pieces at their places.
    """

    kind = "xlnet"
    eos = EOD
    lines_are_sentences = True

    def __init__(self, model: bytes, lower: bool = False):
        if not isinstance(lower, bool):
            raise ValueError(f"lower is {lower!r}, not true or false")
        self.model = model
        self.lower = lower
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.pieces = processor(model)
        self.vocab_size = self.pieces.get_piece_size()
        problems = self._special_problems()
        if problems:
            raise ValueError(", ".join(problems))
        self.resplit = self._resplit_pieces()

    def _special_problems(self) -> list[str]:
        """Describe each special piece that is missing, has another number, or could be written in a text."""
        problems = []
        for name, token in SPECIALS.items():
            actual = self.pieces.piece_to_id(name)
            if self.pieces.id_to_piece(actual) != name:
                problems.append(f"it has no {name}")
            elif actual != token:
                problems.append(f"{name} is piece {actual}, not {token}")
            elif name != IN_TEXT and not (self.pieces.is_unknown(token) or self.pieces.is_control(token)):
                problems.append(f"{name} is not a control symbol, so a text could hold it")
        return problems

    def _resplit_pieces(self) -> dict[int, list[int]]:
        """Return what the authors' code makes of each piece that ends in a digit and a comma: the piece -> its parts.

        The number is encoded by itself, and the comma follows it as a piece of its own, so that a number is made of the
        same pieces whether or not a comma follows.
        """
        names: list[str] = self.pieces.id_to_piece(list(range(self.vocab_size)))
        parts = {}
        for token, name in enumerate(names):
            if name.endswith(",") and name[-2:-1].isdigit():
                parts[token] = self.pieces.piece_to_id(self._resplit(name))
        return parts

    def _resplit(self, name: str) -> list[str]:
        number: list[str] = self.pieces.encode(name[:-1].replace(BLOCK, ""), out_type=str)
        if not name.startswith(BLOCK) and number and number[0].startswith(BLOCK):
            first = number[0].removeprefix(BLOCK)  # the encoder puts a space in front, and the text has none
            number = [first, *number[1:]] if first else number[1:]
        return [*number, ","]

    @classmethod
    def train(cls, lines: Iterable[str], vocab_size: int, lower: bool) -> "XLNetTokenizer":
        """Train on lines of text with the authors' settings. The result depends on nothing else.

        Raises:
            UserError: if the text allows no vocabulary of this size; it names a size that would work.
        """
        controls = [name for name in SPECIALS if name not in ("<unk>", "<s>", "</s>", IN_TEXT)]
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=sentences(normalise(line, lower) for line in lines),
                model_writer=model,
                model_type="unigram",
                vocab_size=vocab_size,
                character_coverage=0.99995,
                unk_id=SPECIALS["<unk>"],
                bos_id=SPECIALS["<s>"],
                eos_id=SPECIALS["</s>"],
                pad_id=-1,  # <pad> is a control symbol like the others
                control_symbols=controls,
                user_defined_symbols=USER_DEFINED,
                num_threads=4,  # a constant, because each thread sums its part: the rounding depends on their number
                minloglevel=3,
            )
        except RuntimeError as error:
            raise UserError(vocabulary_problem(cls.kind, MIN_XLNET_PIECES, vocab_size, str(error))) from error
        return cls(model.getvalue(), lower)

    @classmethod
    def open(cls, path: Path, lower: bool = False) -> "XLNetTokenizer":
        """Read a .model file.

        Raises:
            UserError: if it is not a SentencePiece model, or one without XLNet's special pieces at their places.
        """
        try:
            model = path.read_bytes()
            processor(model)
        except (OSError, ValueError) as error:
            raise UserError(
                f"tokenizer.model={path}: cannot be read as a SentencePiece model ({error}); give another file"
            ) from error
        try:
            return cls(model, lower)
        except ValueError as error:
            raise UserError(
                f"tokenizer.model={path}: is not a vocabulary of XLNet: {error}; give an XLNet model's spiece.model, "
                "or tokenizer.model=null to train one"
            ) from error

    def encode(self, data: bytes, end: bool) -> np.ndarray:
        lines = [normalise(line, self.lower) for line in data.decode().split("\n")]
        tokens: list[int] = []
        # One by one: for a list, SentencePiece starts threads, which costs more than a line does.
        for line in map(self.pieces.encode, filter(None, lines)):
            if self.resplit.keys().isdisjoint(line):
                tokens.extend(line)
            else:
                for token in line:
                    tokens.extend(self.resplit.get(token, (token,)))
        return np.array(tokens + [self.eos] * end, self.dtype)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        tokens: list[int] = []
        spans: list[tuple[int, int]] = []
        position = 0
        for line in text.split("\n"):
            normal, origins = normalise_with_offsets(line, self.lower)
            ids, positions = encode_line_with_offsets(self.pieces, normal)
            for token, (begin, end) in zip(ids, positions.tolist(), strict=True):
                for part, start, stop in self._parts(token, begin, end):
                    tokens.append(part)
                    first = origins[start][0] if start < len(origins) else len(line)
                    last = origins[stop - 1][1] if start < stop else first
                    spans.append((position + first, position + last))
            position += len(line) + 1
        return np.array(tokens, self.dtype), np.array(spans, np.int64).reshape(-1, 2)

    def _parts(self, token: int, begin: int, end: int) -> list[tuple[int, int, int]]:
        """Return what the comma rule makes of a piece of the characters [begin, end): each part, and its characters."""
        if token not in self.resplit:
            return [(token, begin, end)]
        parts: list[tuple[int, int, int]] = []
        names = self._resplit(self.pieces.id_to_piece(token))
        for part, name in zip(reversed(self.resplit[token]), reversed(names), strict=True):
            is_first = len(parts) == len(names) - 1
            start = begin if is_first else max(begin, end - len(name))
            parts.insert(0, (part, start, end))
            end = start
        return parts

    def decoder(self) -> Decoder:
        return SentencePieceDecoder(self.pieces)

    def token_bytes(self) -> None:
        return None  # the normalisation loses too much

    def word_starts(self) -> np.ndarray:
        names: list[str] = self.pieces.id_to_piece(list(range(self.vocab_size)))
        return np.array([begins_word(name) or name.startswith("<") for name in names])

    @property
    def specials(self) -> dict[str, int]:
        return dict(SPECIALS)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"lower": self.lower}

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / MODEL_FILE).write_bytes(self.model)


def normalise(line: str, lower: bool) -> str:
    """Return a line as XLNet reads it, empty if it is blank (the authors' `preprocess_text`).

    White space becomes single spaces, and the quotes `` and '' become ". Characters are decomposed (NFKD) and lose
    their accents.
    """
    text = " ".join(line.split()).replace("``", '"').replace("''", '"')
    if not text.isascii():
        decomposed = unicodedata.normalize("NFKD", text)
        text = "".join(character for character in decomposed if not unicodedata.combining(character))
    return text.lower() if lower else text


def normalise_with_offsets(line: str, lower: bool) -> tuple[str, list[tuple[int, int]]]:
    """Return `normalise(line, lower)`, and of each of its characters from which characters of the line it was made.

    A space was made of a whole run of white space; accents that are lost belong to the character before them.
    """
    characters: list[str] = []
    origins: list[tuple[int, int]] = []
    for match in NORMALISED.finditer(line.rstrip()):
        begin, end = match.span()
        if match[0].isspace():
            characters += " " * (begin > 0)
            origins += [(begin, end)] * (begin > 0)  # the line's first white space is lost
            continue
        for character in '"' if end - begin > 1 else unicodedata.normalize("NFKD", match[0]):
            if not unicodedata.combining(character):
                characters.append(character)
                origins.append((begin, end))
            elif origins:
                origins[-1] = (origins[-1][0], end)
    text = "".join(characters)
    return text.lower() if lower else text, origins
