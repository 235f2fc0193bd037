"""From text to token numbers and back: bytes, words, SentencePiece, and XLNet's way with SentencePiece.

`ids` is for sequences that are not text: there the numbers themselves are the tokens.

Every tokenizer has a token, `<eos>` or XLNet's `<eod>`, that ends a document (with words: a line, as in the Penn
Treebank and WikiText-103 experiments of the Transformer-XL paper). They are saved as JSON, text and SentencePiece's own
format; no pickle.
"""

from txl_dist.data.tokenizers.base import EOS, UNK, Decoder, Tokenizer
from txl_dist.data.tokenizers.byte import BytesTokenizer
from txl_dist.data.tokenizers.ids import IdsTokenizer, Picture, Sound
from txl_dist.data.tokenizers.loading import load
from txl_dist.data.tokenizers.sentencepiece import SentencePieceTokenizer
from txl_dist.data.tokenizers.word import WordTokenizer
from txl_dist.data.tokenizers.xlnet import XLNetTokenizer

__all__ = [
    "EOS",
    "UNK",
    "BytesTokenizer",
    "Decoder",
    "IdsTokenizer",
    "Picture",
    "SentencePieceTokenizer",
    "Sound",
    "Tokenizer",
    "WordTokenizer",
    "XLNetTokenizer",
    "load",
]
