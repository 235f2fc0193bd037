"""Dropout, of single numbers or variational."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Module):
    """Dropout of [..., positions, width]; variational: the same of the width at all positions (Gal & Ghahramani 2016).

    Args:
        p: the share that is dropped.
    """

    def __init__(self, p: float, variational: bool):
        super().__init__()
        self.p, self.variational = p, variational

    def forward(self, x: Tensor) -> Tensor:
        if not (self.variational and self.training and self.p):
            return F.dropout(x, self.p, self.training)
        return x * F.dropout(torch.ones_like(x[..., :1, :]), self.p)
