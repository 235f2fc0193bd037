"""Token = byte of the UTF-8 text; 256 is `<eos>`."""

from typing import Any

from transformers import PreTrainedTokenizer

EOS = "<eos>"


class BytesTokenizer(PreTrainedTokenizer):
    """A byte's token is written `<0x41>`. A text begins with `<eos>`, which stands between documents."""

    vocab_files_names: dict[str, str] = {}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, **kwargs: Any):
        self.ids = {f"<0x{byte:02X}>": byte for byte in range(256)} | {EOS: 256}
        self.names = list(self.ids)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens."""
        return len(self.names)

    def get_vocab(self) -> dict[str, int]:
        """Return all tokens and their numbers."""
        return dict(self.ids)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [self.names[byte] for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.names[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Decode bytes, errors replaced; `<eos>` has no text."""
        return bytes(self.ids[token] for token in tokens if token != EOS).decode(errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write no file: the vocabulary is all bytes."""
        return ()
