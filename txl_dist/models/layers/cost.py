"""Floating-point operations: counted, not measured, so that every rank finds the same number.

A product of matrices [a, b] x [b, c] counts 2abc (a multiplication and an addition each); element-wise operations count
nothing. In backward each factor that needs a gradient costs as much again: two as a rule, one where the other factor
depends on no parameter (the memory, the encoding of distances). Each layer lists its own products.
"""

from math import log
from typing import NamedTuple


class Product(NamedTuple):
    """A product of matrices, as it runs.

    Attributes:
        forward: its operations in a forward.
        gradients: how many of its two factors need a gradient.
        visible: in attention the fraction of the keys, on average, that a query may see.
        recomputed: how often backward computes it once more, to keep no result: this is no work of the model.
    """

    forward: float
    gradients: int = 2
    visible: float = 1.0
    recomputed: int = 0

    @property
    def training(self) -> float:
        """Return its operations in a forward and a backward."""
        return self.forward * (1 + self.gradients)


def zipf_share(start: int, end: int, vocab_size: int) -> float:
    """Return the fraction of a text's tokens whose rank is from start to end, where rank r occurs 1/r as often."""
    return log((end + 1) / (start + 1)) / log(vocab_size + 1)
