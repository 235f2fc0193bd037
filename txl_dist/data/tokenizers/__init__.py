"""From text to token numbers and back: bytes, words, SentencePiece, and XLNet's way with SentencePiece.

Every tokenizer has a token, `<eos>` or XLNet's `<eod>`, that ends a document (with words: a line, as in the Penn
Treebank and WikiText-103 experiments of the Transformer-XL paper). They are saved as JSON, text and SentencePiece's own
format; no pickle.
"""

from txl_dist.data.tokenizers.base import EOS, UNK, Decoder, Tokenizer
from txl_dist.data.tokenizers.byte import BytesTokenizer
from txl_dist.data.tokenizers.loading import load
from txl_dist.data.tokenizers.sentencepiece import SentencePieceTokenizer
from txl_dist.data.tokenizers.word import WordTokenizer
from txl_dist.data.tokenizers.xlnet import XLNetTokenizer

__all__ = [
    "EOS",
    "UNK",
    "BytesTokenizer",
    "Decoder",
    "SentencePieceTokenizer",
    "Tokenizer",
    "WordTokenizer",
    "XLNetTokenizer",
    "load",
]
