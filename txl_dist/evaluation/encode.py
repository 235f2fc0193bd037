"""Encode a text that a user has given."""

from txl_dist.data.tokenizers import Tokenizer
from txl_dist.errors import UserError


def encode_text(tokenizer: Tokenizer, text: str | bytes, key: str) -> list[int]:
    """Return the tokens of a text, byte for byte; an argument that is not UTF-8 keeps its bytes, too.

    Args:
        key: of the config, by which an error names the text.

    Raises:
        UserError: where the text is not UTF-8, or not numbers, and the tokenizer reads nothing else.
    """
    try:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
        return tokenizer.encode(data, end=False).tolist()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key}: byte {error.start + 1:,} (0x{error.object[error.start]:02X}) is not UTF-8, and the tokenizer of "
            f"this run ({tokenizer.kind}) reads nothing else; convert the text first: iconv -f LATIN1 -t UTF-8"
        ) from error
    except UnicodeEncodeError as error:
        raise UserError(
            f"{key}: character {error.start + 1:,} is half of a surrogate pair, which is not text; remove it"
        ) from error
    except ValueError as error:
        raise UserError(f"{key}: {error}; give numbers with spaces between them") from error
