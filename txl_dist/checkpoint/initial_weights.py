"""The weights with which a new run begins in place of random ones (run.init_from)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class InitialWeights:
    """Weights of another run or of a third-party checkpoint, known to fit the model.

    Attributes:
        origin: where they come from, for people.
        read: returns at least the parameters of these names, in float32; but for those of the head of a task, which
            keep their drawn values.
    """

    origin: str
    read: Callable[[Iterable[str]], Mapping[str, Tensor]]

    def load_weights(self, model: nn.Module) -> None:
        """Copy the weights into a model."""
        parameters = dict(model.named_parameters())
        weights = self.read(parameters)
        with torch.no_grad():
            for name, parameter in parameters.items():
                if name in weights:
                    parameter.copy_(weights[name])
