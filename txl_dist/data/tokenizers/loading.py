"""Read a saved tokenizer."""

import json
from pathlib import Path
from typing import Any

from txl_dist.data.tokenizers.base import Tokenizer
from txl_dist.data.tokenizers.byte import BytesTokenizer
from txl_dist.data.tokenizers.ids import IdsTokenizer
from txl_dist.data.tokenizers.sentencepiece import SentencePieceTokenizer
from txl_dist.data.tokenizers.word import WordTokenizer
from txl_dist.data.tokenizers.xlnet import MODEL_FILE, XLNetTokenizer
from txl_dist.errors import UserError


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
        elif facts["kind"] == "xlnet":
            tokenizer = XLNetTokenizer((folder / MODEL_FILE).read_bytes(), facts["lower"])
        elif facts["kind"] == "ids":
            tokenizer = IdsTokenizer.of_facts(facts)
        else:
            raise UserError(
                f"{path}: kind {facts['kind']!r} is unknown here; it is bytes, word, sentencepiece, xlnet or ids"
            )
        if (tokenizer.vocab_size, tokenizer.eos) != (facts["vocab_size"], facts["eos"]):
            raise UserError(f"{path}: its vocabulary has {tokenizer.vocab_size} tokens, not {facts['vocab_size']}")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder}: holds no tokenizer that can be read ({error})") from error
    return tokenizer
