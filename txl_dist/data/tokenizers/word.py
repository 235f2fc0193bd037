"""One token per word."""

import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np

from txl_dist.data.tokenizers.base import EOS, UNK, Decoder, Tokenizer
from txl_dist.errors import UserError

LINE_END_OR_WORD = re.compile(r"\n|\S+")  # what becomes a token


class WordTokenizer(Tokenizer):
    """One token per word, as white space separates them; `<eos>` after every line, `<unk>` for an unknown word.

    `<unk>` written in the text is that token, too; `<eos>` written in the text is always an unknown word.

    Args:
        words: the vocabulary in the order of the tokens; `<eos>` and `<unk>` are among them.
    """

    kind = "word"

    def __init__(self, words: list[str]):
        self.words = words
        self.vocab_size = len(words)
        self.eos = words.index(EOS)
        self.unk = words.index(UNK)
        self.ids = {word: token for token, word in enumerate(words) if token != self.eos}

    @classmethod
    def train(cls, counts: Counter[str], vocab_size: int | None, min_count: int) -> "WordTokenizer":
        """Make a vocabulary in the order of the paper's code: `<eos>`, then the words by frequency.

        Words of equal count keep the order of `counts`. `<unk>` is one of the words; if the text has none, it comes
        first. There are at most `vocab_size` tokens in all.
        """
        known = [word for word, count in counts.most_common() if count >= min_count and word != EOS]
        size = vocab_size and vocab_size - 1
        if UNK not in known[:size]:
            known.insert(0, UNK)
        return cls([EOS, *known[:size]])

    @staticmethod
    def read_counts(path: Path) -> Counter[str]:
        """Read a published vocabulary with "word count" in each line.

        So Jozefowicz et al. (2016) published the words of the 1-billion-word benchmark: `<S>`, around every sentence,
        is `<eos>`, and `<UNK>` is `<unk>`.

        Raises:
            UserError: if it is another kind of file.
        """
        counts: Counter[str] = Counter()
        names = {"<S>": EOS, "<UNK>": UNK}
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                word, count = line.decode().split()
                counts[names.get(word, word)] = int(count)
            except ValueError as error:
                raise UserError(f"{path}: line {number} is not a word and its count; fetch it again") from error
        if EOS not in counts or UNK not in counts:
            raise UserError(f"{path}: has no <S> or no <UNK>; it is not the published vocabulary; fetch it again")
        return counts

    @classmethod
    def open(cls, path: Path) -> "WordTokenizer":
        """Read a vocabulary file: one word per line, in the order of the tokens.

        A byte order mark and the line ends of Windows are left out.

        Raises:
            UserError: if it cannot be read, or is not a vocabulary of words with `<eos>` and `<unk>`.
        """
        try:
            lines = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
        except OSError as error:
            raise UserError(f"{path}: cannot be read as a vocabulary ({error.strerror}); give another file") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: cannot be read as a vocabulary ({error}); convert it (iconv) to UTF-8") from error
        words = [line.removesuffix("\r") for line in lines]
        for number, word in enumerate(words, 1):
            if word.split() != [word]:
                raise UserError(f"{path}: line {number} is not one word, but {word[:40]!r}; give one word per line")
        return cls.checked(words, path)

    @classmethod
    def checked(cls, words: list[str], path: Path) -> "WordTokenizer":
        """Make a tokenizer of the words of a file from elsewhere.

        Raises:
            UserError: if they are not a vocabulary of words with `<eos>` and `<unk>`.
        """
        problems = [f"it has no {word}" for word in (EOS, UNK) if word not in words]
        if len(set(words)) < len(words):
            problems.append("a word is in it twice")
        if any(word.split() != [word] for word in set(words)):
            problems.append("a word in it is empty or has white space")
        if problems:
            raise UserError(f"{path}: is not a vocabulary of the word tokenizer: {', '.join(problems)}")
        return cls(words)

    def encode(self, data: bytes, end: bool) -> np.ndarray:
        tokens: list[int] = []
        unknown = itertools.repeat(self.unk)
        lines = data.decode().split("\n")
        rest = lines.pop()
        for line in lines:
            tokens.extend(map(self.ids.get, line.split(), unknown))
            tokens.append(self.eos)
        tokens.extend(map(self.ids.get, rest.split(), unknown))
        if rest and end:
            tokens.append(self.eos)
        return np.array(tokens, self.dtype)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        spans = [match.span() for match in LINE_END_OR_WORD.finditer(text)]
        return self.encode(text.encode(), False), np.array(spans, np.int64).reshape(-1, 2)

    def decoder(self) -> Decoder:
        return WordDecoder(self)

    def token_bytes(self) -> None:
        return None  # white space and unknown words are lost

    def word_starts(self) -> np.ndarray:
        return np.ones(self.vocab_size, bool)

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / "vocab.txt").write_bytes("".join(f"{word}\n" for word in self.words).encode())


class WordDecoder(Decoder):
    """Puts a space between the words of a line."""

    def __init__(self, tokenizer: WordTokenizer):
        self.tokenizer = tokenizer
        self.space = ""

    def feed(self, token: int) -> str:
        if token == self.tokenizer.eos:
            self.space = ""
            return "\n"
        text = self.space + self.tokenizer.words[token]
        self.space = " "
        return text

    def end(self) -> str:
        return ""
