"""Token = word, as white space separates them; `<eos>` after every line, `<unk>` for an unknown word."""

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

EOS = "<eos>"
UNK = "<unk>"


class WordTokenizer(PreTrainedTokenizer):
    """A vocabulary of words; a text begins with `<eos>`, as if a line had ended before it.

    Args:
        vocab_file: vocab.txt, one word per line in the order of the tokens.
    """

    vocab_files_names = {"vocab_file": "vocab.txt"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs: Any):
        self.vocab_file = vocab_file
        self.words = Path(vocab_file).read_bytes().decode().split("\n")[:-1]
        self.ids = {word: token for token, word in enumerate(self.words)}
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens."""
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        """Return all tokens and their numbers."""
        return dict(self.ids)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        first, *lines = text.split("\n")
        tokens = self._known(first)
        for line in lines:
            tokens += [EOS, *self._known(line)]
        return tokens

    def _known(self, line: str) -> list[str]:
        """Split a line into words, with `<unk>` for unknown ones; `<eos>` written in a text is unknown."""
        return [word if word in self.ids and word != EOS else UNK for word in line.split()]

    def _convert_token_to_id(self, token: str) -> int:
        return self.ids.get(token, self.ids[UNK])

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join words with spaces; `<eos>` is a line end."""
        text = ""
        space = ""
        for token in tokens:
            text += "\n" if token == EOS else space + token
            space = "" if token == EOS else " "
        return text

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copy vocab.txt to a folder."""
        target = Path(save_directory) / "vocab.txt"
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
