"""Write continuations to files: text, numbers, images, sounds."""

import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from txl_dist.data.mu_law import from_mu_law
from txl_dist.data.tokenizers import IdsTokenizer, Picture, Sound, Tokenizer
from txl_dist.evaluation.sampling import Completion
from txl_dist.files.atomic import atomic_file

Format = Literal["text", "ids", "png", "wav"]

MAX_TOKENS = 300  # where nobody says how many, and nothing else does


def format_problems(run: str, format: Format, tokenizer: Tokenizer, completions: Sequence[Completion]) -> Iterator[str]:
    """Yield why the tokens of a run cannot be written in a format, or a prompt leaves nothing to continue."""
    wanted = {"png": Picture, "wav": Sound}.get(format)
    content = tokenizer.content if isinstance(tokenizer, IdsTokenizer) else None
    if wanted is not None and not isinstance(content, wanted):
        kind = {Picture: "images", Sound: "sounds"}[wanted]
        yield f"format={format}: {run} was not trained on {kind}; give format=text"
    elif wanted is Picture and isinstance(content, Picture):
        for completion in completions:
            given = len(completion.tokens)
            if given > content.size:
                yield f"prompt: has {given:,} numbers, more than the {content.size:,} of an image of {run}"


def tokens_wanted(
    max_tokens: int | None, format: Format, tokenizer: Tokenizer, completions: Sequence[Completion]
) -> int:
    """Return how many tokens are to be generated: of an image by default those that are missing, and never more."""
    content = tokenizer.content if isinstance(tokenizer, IdsTokenizer) else None
    if format != "png" or not isinstance(content, Picture):
        return MAX_TOKENS if max_tokens is None else max_tokens
    missing = content.size - min(len(completion.tokens) for completion in completions)
    return missing if max_tokens is None else min(max_tokens, missing)


def written(completion: Completion, format: Format) -> str:
    """Return a continuation with its prompt, as text or as the numbers of its tokens."""
    return " ".join(map(str, completion.tokens)) if format == "ids" else completion.text


def numbered(out: Path, count: int) -> list[Path]:
    """Return the path of each of several files: a number stands before the suffix."""
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in range(1, count + 1)]


def write_file(path: Path, format: Format, tokenizer: Tokenizer, completion: Completion) -> str:
    """Write a continuation with its prompt; return a line that says what was written."""
    content = tokenizer.content if isinstance(tokenizer, IdsTokenizer) else None
    tokens = completion.tokens[: content.size] if isinstance(content, Picture) else completion.tokens
    levels = np.array(tokens, np.int64)
    with atomic_file(path) as temporary:
        if format == "png":
            assert isinstance(content, Picture)
            write_image(temporary, content, levels)
        elif format == "wav":
            assert isinstance(content, Sound)
            write_sound(temporary, content, levels)
        else:
            temporary.write_text(f"{written(completion, format)}\n", "utf-8")
    missing = content.size - len(tokens) if format == "png" and isinstance(content, Picture) else 0
    return f"{path}: {len(tokens):,} tokens" + (f"; {missing:,} are missing, and 0" if missing > 0 else "")


def write_image(path: Path, picture: Picture, levels: np.ndarray) -> None:
    """Write numbers [n], as many as an image has at most; those that are missing are 0."""
    from PIL import Image

    filled = np.zeros(picture.size, np.uint8)
    filled[: len(levels)] = levels
    shape = (picture.height, picture.width, picture.channels)
    Image.fromarray(filled.reshape(shape if picture.channels == 3 else shape[:2])).save(path)


def write_sound(path: Path, sound: Sound, levels: np.ndarray) -> None:
    """Write mu-law levels [n] as a WAV file of one channel and 16 bits."""
    samples = (from_mu_law(levels) * 2**15).round().clip(-(2**15), 2**15 - 1).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sound.rate)
        file.writeframes(samples.tobytes())
