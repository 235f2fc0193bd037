"""A SentencePiece model, applied line by line, line ends included; it needs the package sentencepiece."""

import io
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

BLOCK = "\u2581"  # SentencePiece writes it for a space; in a text it is encoded as bytes, where the model has them


class SentencePieceTokenizer(PreTrainedTokenizer):
    """A SentencePiece model; a text begins with the end-of-text token, which stands between documents.

    Args:
        vocab_file: sentencepiece.model.
    """

    vocab_files_names = {"vocab_file": "sentencepiece.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs: Any):
        self.vocab_file = vocab_file
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        block = [f"<0x{byte:02X}>" for byte in BLOCK.encode()]
        self.block = block if all(self.pieces.is_byte(self.pieces.piece_to_id(byte)) for byte in block) else []
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens."""
        return self.pieces.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """Return all tokens and their numbers."""
        return {self.pieces.id_to_piece(token): token for token in range(self.vocab_size)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        tokens: list[str] = []
        for i, part in enumerate(text.split(BLOCK) if self.block else [text]):
            tokens += self.block if i else []
            for line in io.StringIO(part, newline="\n"):
                tokens += map(self.pieces.id_to_piece, self.pieces.encode(line, num_threads=1))
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Decode pieces; adjacent bytes are decoded together, because a character may consist of several."""
        text = b""
        for token in tokens:
            number = self.pieces.piece_to_id(token)
            if self.pieces.is_byte(number):
                text += bytes([int(token[3:5], 16)])  # "<0xE2>"
            elif self.pieces.is_control(number) or self.pieces.is_unknown(number):
                text += self.pieces.decode([number]).encode()
            else:
                text += token.replace(BLOCK, " ").encode()
        return text.decode(errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copy sentencepiece.model to a folder."""
        target = Path(save_directory) / "sentencepiece.model"
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
