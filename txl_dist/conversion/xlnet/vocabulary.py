"""Load spiece.model, the vocabulary beside a published XLNet model."""

from pathlib import Path

from txl_dist.data.tokenizers import Tokenizer, XLNetTokenizer
from txl_dist.errors import UserError
from txl_dist.files.parsing import describe

FILE = "spiece.model"


def load(path: Path, lower: bool = False) -> Tokenizer:
    """Load a spiece.model.

    Args:
        lower: whether text is lower-cased before.

    Raises:
        UserError: where it cannot be read, or is no vocabulary of XLNet.
    """
    try:
        return XLNetTokenizer(path.read_bytes(), lower)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as XLNet's SentencePiece model ({describe(error)})") from error
