"""Write a SentencePiece model as Hugging Face's tokenizer.json, with XLNet's normalisation.

Without this file transformers 5 makes another tokenizer of spiece.model: it splits at white space first, and texts get
other tokens. The format is that of the package tokenizers, as of 0.15 and later.
"""

import base64
import struct
from typing import Any

from txl_dist.data.tokenizers.sentencepiece import protobuf_fields

# Roles in transformers' tokenizers; XLNet's other special pieces are <eop> and <eod>.
SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "<sep>",
    "pad_token": "<pad>",
    "cls_token": "<cls>",
    "mask_token": "<mask>",
}

# Numbers of fields in sentencepiece_model.proto: of ModelProto ...
PIECES = 1
NORMALIZER = 3
# ... of its SentencePiece ...
PIECE = 1
SCORE = 2
# ... and of its NormalizerSpec.
CHARSMAP = 2

WHITE_SPACE = r"[\s\x1c-\x1f]+"  # what Python's str.split takes for it
NUMBER_AND_COMMA = -100.0  # what is added to the score of a piece that the authors' rule splits, as in transformers 4


def tokenizer_json(model: bytes, lower: bool) -> dict[str, Any]:
    """Return the content of tokenizer.json for a spiece.model.

    Args:
        model: the content of spiece.model.
        lower: whether text is lower-cased.
    """
    pieces = []
    normalizer = b""
    for number, value in protobuf_fields(model):
        assert isinstance(value, bytes)
        if number == PIECES:
            pieces.append(piece_and_score(value))
        elif number == NORMALIZER:
            normalizer += value
    charsmap = dict(protobuf_fields(normalizer)).get(CHARSMAP, b"")
    assert isinstance(charsmap, bytes)
    ids = {piece: token for token, (piece, _) in enumerate(pieces)}
    space = {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True, "prepend_scheme": "always"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(name, ids[name]) for name in [*SPECIAL_TOKENS.values(), "<eod>", "<eop>"]],
        "normalizer": {"type": "Sequence", "normalizers": normalizers(charsmap, lower)},
        "pre_tokenizer": space,
        "post_processor": template(ids),
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": ids["<unk>"], "vocab": pieces},
    }


def piece_and_score(message: bytes) -> tuple[str, float]:
    """Parse a SentencePiece of the model; a number with a comma behind it gets a score with which it is not chosen."""
    fields = dict(protobuf_fields(message))
    name = fields[PIECE]
    score = fields.get(SCORE, bytes(4))
    assert isinstance(name, bytes) and isinstance(score, bytes)
    piece = name.decode()
    (value,) = struct.unpack("<f", score)
    splits = piece.endswith(",") and piece[-2:-1].isdigit()
    return piece, value + NUMBER_AND_COMMA * splits


def normalizers(charsmap: bytes, lower: bool) -> list[dict[str, Any]]:
    """Return XLNet's normalisation: quotes, decomposition without accents, SentencePiece's own rules, single spaces."""
    steps: list[dict[str, Any]] = [
        replace({"Regex": WHITE_SPACE}, " "),
        replace({"String": "``"}, '"'),
        replace({"String": "''"}, '"'),
        {"type": "NFKD"},
        {"type": "StripAccents"},
    ]
    if lower:
        steps.append({"type": "Lowercase"})
    if charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    return [*steps, replace({"Regex": " {2,}"}, " "), {"type": "Strip", "strip_left": True, "strip_right": True}]


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    """Return a normalizer that replaces a text."""
    return {"type": "Replace", "pattern": pattern, "content": content}


def added_token(name: str, token: int) -> dict[str, Any]:
    """Return a special token; `<mask>` takes the space before it, as a word does."""
    takes_space = name == "<mask>"
    flags = {"single_word": False, "lstrip": takes_space, "rstrip": False, "normalized": takes_space, "special": True}
    return {"id": token, "content": name} | flags


def template(ids: dict[str, int]) -> dict[str, Any]:
    """Return how one or two texts become a sequence: A <sep> B <sep> <cls>, with the segments 0, 1 and 2."""

    def text(name: str, segment: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": segment}}

    def special(name: str, segment: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": segment}}

    tokens = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in ("<sep>", "<cls>")}
    first = [text("A", 0), special("<sep>", 0)]
    return {
        "type": "TemplateProcessing",
        "single": [*first, special("<cls>", 2)],
        "pair": [*first, text("B", 1), special("<sep>", 1), special("<cls>", 2)],
        "special_tokens": tokens,
    }
