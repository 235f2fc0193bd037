"""Dropout, of single numbers or variational."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Module):
    """Dropout of [..., positions, width]; variational: one mask of the width for all positions (Gal & Ghahramani 2016).

    Args:
        p: the probability to drop a number.
    """

    def __init__(self, p: float, variational: bool):
        super().__init__()
        self.p = p
        self.variational = variational

    def forward(self, x: Tensor) -> Tensor:
        """Drop numbers of [..., positions, width] in training, and scale the others by 1 / (1 - p)."""
        if not (self.variational and self.training and self.p):
            return F.dropout(x, self.p, self.training)
        return x * F.dropout(torch.ones_like(x[..., :1, :]), self.p)
