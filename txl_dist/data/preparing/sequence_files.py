"""The kinds of files that hold numbers: .npy and JSON, images and sounds, and any file as its bytes.

The process that prepares a dataset looks at the files and cuts them into pieces; others turn pieces into numbers.
"""

import hashlib
import io
import json
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from txl_dist.config.schema import DuplicationCorpusConfig, FilesCorpusConfig, IdsCorpusConfig, TokensCorpusConfig
from txl_dist.data.mu_law import mu_law
from txl_dist.data.preparing import splitting
from txl_dist.data.preparing.corpora import BLOCK, SourceFile, SurveyedFile
from txl_dist.data.preparing.text_files import opened
from txl_dist.errors import UserError
from txl_dist.files.parsing import PARSE_ERRORS, describe, shown

DRAWN = np.dtype("<u2")  # of numbers that no file holds
KINDS = (".npy", ".jsonl", ".json")
DEEP = ("I", "F")  # how Pillow names pixels of more than 8 bits
SAMPLE_TYPES = {1: "u1", 2: "<i2", 4: "<i4"}  # of PCM, by their bytes; numpy has none for 24 bits


class SequencePiece(NamedTuple):
    """Consecutive numbers of one document, or a file with several documents.

    Attributes:
        split: None if each document has its own.
        number: of the document in the file, from 0 (of its line, if that is a document); None if the file has several.
        place: how many numbers of the document come before this piece.
        layout: how `data` are numbers: the dtype of an array, or bytes per sample and channels of PCM; None: that is
            said by the data, JSON or an image.
        first, last: whether the document begins, and ends, in this piece.
    """

    source: SourceFile
    split: str | None
    number: int | None
    place: int
    data: bytes
    layout: str | tuple[int, int] | None
    first: bool
    last: bool


def describe_place(piece: SequencePiece, number: int) -> str:
    """Name a document of a piece for a message."""
    is_line = piece.layout is None and piece.number is not None
    return f"line {number + 1:,}" if is_line else f"document {number + 1:,}"


# ------------------------------------------------------------------------------------------------------- looking


def look_at(
    config: TokensCorpusConfig | FilesCorpusConfig, source: SourceFile, advance: Callable[[int], None]
) -> tuple[SurveyedFile, int | None]:
    """Read a file once, for its size and SHA-256, and look at what it is.

    Args:
        advance: is called with the number of bytes read.

    Returns:
        The file, and the samples per second of a sound.

    Raises:
        UserError: if it cannot be read, or is not what it should be.
    """
    is_json = isinstance(config, TokensCorpusConfig) and kind_of(source.path) != ".npy"
    digest = hashlib.sha256()
    size = 0
    with opened(source.path) if is_json else opened_as_it_is(source.path) as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            size += len(block)
            advance(len(block))
    rate = None
    if size:
        if isinstance(config, TokensCorpusConfig):
            look_at_numbers(config, source)
        elif config.read == "image":
            look_at_image(source.path)
        elif config.read == "audio":
            rate = look_at_sound(source.path)
    return SurveyedFile(source, size, digest.hexdigest()), rate


@contextmanager
def opened_as_it_is(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, whatever it is.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            yield stream
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def kind_of(path: Path) -> str:
    """Return the suffix of a file of numbers, without that of its compression.

    Raises:
        UserError: if it is another kind of file.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix.lower() not in (".gz", ".zst")]
    kind = suffixes[-1].lower() if suffixes else ""
    if kind not in KINDS:
        raise UserError(f"{path}: is not a file of numbers by its name; give {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    return kind


def look_at_numbers(config: TokensCorpusConfig, source: SourceFile) -> None:
    """Raise a UserError if a file is not a file of numbers; of JSON with one document per line the first is read."""
    if kind_of(source.path) == ".npy":
        open_array(source.path)
        return
    piece = next(read_json(source), None)
    if piece is not None:
        for _ in documents(piece, config):
            pass


def look_at_image(path: Path) -> None:
    """Raise a UserError if a file does not begin as an image, or its pixels have more than 8 bits."""
    from PIL import Image

    with opened_as_it_is(path) as stream, image_errors(path), Image.open(stream) as image:
        mode = image.mode
    if mode.startswith(DEEP):
        raise UserError(f"{path}: its pixels have more than 8 bits; convert it to an image of 8 bits")


def look_at_sound(path: Path) -> int:
    """Return the samples per second of a WAV file.

    Raises:
        UserError: if it is not one of whole numbers, or ends too early.
    """
    with opened_sound(path) as sound:
        length = sound.getnframes()
        read = sum(len(block) // frame_size(sound) for block in blocks_of(sound))
        if read != length:
            raise UserError(f"{path}: is cut off: it has {read:,} of its {length:,} samples; copy it again")
        return sound.getframerate()


# ------------------------------------------------------------------------------------------------------- cutting


def read(config: TokensCorpusConfig | FilesCorpusConfig, source: SourceFile, size: int) -> Iterator[SequencePiece]:
    """Cut a file into pieces of at most PIECE_BYTES; an image and a JSON document stay in one.

    Args:
        size: of the file when it was looked at.

    Raises:
        UserError: if it cannot be read, or has become shorter.
    """
    if isinstance(config, TokensCorpusConfig):
        yield from read_array(source) if kind_of(source.path) == ".npy" else read_json(source)
    elif config.read == "image":
        with opened_as_it_is(source.path) as stream:
            yield SequencePiece(source, None, 0, 0, stream.read(), None, first=True, last=True)
    elif config.read == "audio":
        yield from read_sound(source)
    else:
        yield from read_bytes(source, size)


def read_bytes(source: SourceFile, size: int) -> Iterator[SequencePiece]:
    """Yield the bytes of a file as they are."""
    place = 0
    with opened_as_it_is(source.path) as stream:
        while place < size:
            data = stream.read(min(splitting.PIECE_BYTES, size - place))
            if not data:
                raise UserError(f"{source.path}: became shorter while it was read; start again")
            end = place + len(data)
            yield SequencePiece(source, None, 0, place, data, "u1", first=place == 0, last=end == size)
            place = end


def open_array(path: Path) -> np.ndarray:
    """Map a .npy file of integers [documents, numbers], or [numbers] of one document, into memory: two dimensions.

    Raises:
        UserError: if it is another array, or none. Objects are never unpickled.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except PARSE_ERRORS as error:
        reason = describe(error)
        if "object" in reason.lower():
            reason = "it holds Python objects, which are pickles and not read; save an array of integers"
        raise UserError(f"{path}: is not an array of numbers that can be read ({reason})") from error
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise UserError(
            f"{path}: is an array of {array.dtype} with {array.ndim} dimensions; give integers with one (a document) "
            "or two (a row is a document)"
        )
    return array.reshape(1, -1) if array.ndim == 1 else array


def read_array(source: SourceFile) -> Iterator[SequencePiece]:
    """Yield the rows of a .npy file."""
    array = open_array(source.path)
    documents, numbers = array.shape
    step = max(1, splitting.PIECE_BYTES // array.dtype.itemsize)
    for number in range(documents):
        for place in range(0, numbers, step):
            data = array[number, place : place + step].tobytes()
            last = place + step >= numbers
            yield SequencePiece(source, None, number, place, data, array.dtype.str, first=place == 0, last=last)


def read_json(source: SourceFile) -> Iterator[SequencePiece]:
    """Yield the lines of a file with a document in each, but blank ones; or another JSON file as a whole."""
    if has_lines(source.path):
        with opened(source.path) as stream:
            for number, line in enumerate(stream):
                if not line.isspace():
                    yield SequencePiece(source, None, number, 0, line, None, first=True, last=True)
    else:
        with opened(source.path) as stream:
            yield SequencePiece(source, None, None, 0, stream.read(), None, first=True, last=True)


def has_lines(path: Path) -> bool:
    """Return whether each line of a JSON file is a document: by its name, or because its first line is complete."""
    if kind_of(path) == ".jsonl":
        return True
    with opened(path) as stream:
        first = next((line for line in stream if not line.isspace()), b"")
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            return False
        return any(not line.isspace() for line in stream)


@contextmanager
def opened_sound(path: Path) -> Iterator[wave.Wave_read]:
    """Open a WAV file.

    Raises:
        UserError: if it is not one of whole numbers of 8, 16, 24 or 32 bits.
    """
    try:
        with wave.open(str(path), "rb") as sound:
            if sound.getsampwidth() not in (*SAMPLE_TYPES, 3):
                raise wave.Error(f"samples of {sound.getsampwidth()} bytes")
            yield sound
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (wave.Error, *PARSE_ERRORS) as error:
        reason = str(error) or "it ends too early"
        raise UserError(
            f"{path}: is not a WAV file of 8, 16, 24 or 32 bits per sample ({reason}); convert it to PCM"
        ) from error


def frame_size(sound: wave.Wave_read) -> int:
    """Return the bytes of one sample of all channels."""
    return sound.getsampwidth() * sound.getnchannels()


def blocks_of(sound: wave.Wave_read) -> Iterator[bytes]:
    """Yield the samples of a sound, at most PIECE_BYTES at a time; what is left of a sample is dropped."""
    size = frame_size(sound)
    while block := sound.readframes(max(1, splitting.PIECE_BYTES // size)):
        whole = block[: len(block) // size * size]
        if whole:
            yield whole


def read_sound(source: SourceFile) -> Iterator[SequencePiece]:
    """Yield the samples of a WAV file."""
    with opened_sound(source.path) as sound:
        layout = (sound.getsampwidth(), sound.getnchannels())
        length = sound.getnframes()
        place = 0
        for data in blocks_of(sound):
            end = place + len(data) // frame_size(sound)
            yield SequencePiece(source, None, 0, place, data, layout, first=place == 0, last=end == length)
            place = end
        if place != length:
            raise UserError(f"{source.path}: became shorter while it was read; start again")


# --------------------------------------------------------------------- numbers, in the processes of a WorkerPool


def documents(piece: SequencePiece, config: IdsCorpusConfig) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the documents of a piece, or its part of one: the number of each in the file, and its numbers [n].

    Raises:
        UserError: naming file and place, if it holds something else.
    """
    if piece.layout is None and isinstance(config, FilesCorpusConfig):
        yield 0, pixels(piece, config)
    elif piece.layout is None:
        assert not isinstance(config, FilesCorpusConfig | DuplicationCorpusConfig)
        yield from json_documents(piece, config.key)
    elif isinstance(piece.layout, tuple):
        yield 0, levels(piece.data, *piece.layout)
    else:
        assert piece.number is not None
        yield piece.number, np.frombuffer(piece.data, piece.layout)


def json_documents(piece: SequencePiece, key: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the sequences of a line, which is one, or of a whole file, which may have several."""
    where = str(piece.source.path) if piece.number is None else f"{piece.source.path}: line {piece.number + 1:,}"
    try:
        value = json.loads(piece.data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({describe(error)})") from error
    if isinstance(value, dict):
        if key not in value:
            raise UserError(f"{where}: has no key {key!r} (corpus.key), but {shown(list(value))}")
        value = value[key]
    several = piece.number is None and isinstance(value, list) and bool(value) and isinstance(value[0], list)
    for number, sequence in enumerate(value if several else [value], piece.number or 0):
        if not isinstance(sequence, list) or not set(map(type, sequence)) <= {int}:
            place = f"{where}: document {number + 1:,}" if several else where
            raise UserError(f"{place}: is not a list of integers, but {shown(sequence)}")
        try:
            yield number, np.array(sequence, np.int64)
        except OverflowError as error:
            raise UserError(f"{where}: {shown(max(sequence, key=abs))} does not fit into 64 bits") from error


@contextmanager
def image_errors(path: Path) -> Iterator[None]:
    """Raise UserError where Pillow cannot read an image."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: is not an image of a kind that Pillow knows; give images only") from error
    except (OSError, Image.DecompressionBombError, *PARSE_ERRORS) as error:
        raise UserError(f"{path}: is not an image that can be read ({describe(error)})") from error


def pixels(piece: SequencePiece, config: FilesCorpusConfig) -> np.ndarray:
    """Return an image as numbers uint8 [height x width x channels].

    Its middle is cut out, as large as the shape of corpus.size allows, and scaled: a new pixel is the mean of what it
    covers.
    """
    from PIL import Image

    assert config.size is not None
    height, width = config.size
    with image_errors(piece.source.path), Image.open(io.BytesIO(piece.data)) as image:
        colours = image.convert("L" if config.channels == 1 else "RGB")
    scale = min(colours.width / width, colours.height / height)
    left = (colours.width - width * scale) / 2
    top = (colours.height - height * scale) / 2
    box = (left, top, min(left + width * scale, colours.width), min(top + height * scale, colours.height))
    return np.asarray(colours.resize((width, height), Image.Resampling.BOX, box)).reshape(-1)


def levels(data: bytes, width: int, channels: int) -> np.ndarray:
    """Return the mu-law levels uint8 [samples] of PCM, of the mean of its channels.

    Args:
        width: bytes per sample of a channel; of one byte they are 0 to 255, else they have a sign.
    """
    samples: Any
    if width == 3:
        triples = np.frombuffer(data, np.uint8).reshape(-1, 3)
        quadruples = np.zeros((len(triples), 4), np.uint8)
        quadruples[:, 1:] = triples
        samples = quadruples.view("<i4")[:, 0] / 2.0**31
    else:
        samples = np.frombuffer(data, SAMPLE_TYPES[width]) / 2.0 ** (8 * width - 1) - (width == 1)
    return mu_law(samples.reshape(-1, channels).mean(axis=1))
