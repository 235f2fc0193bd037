"""Reversible layers (Gomez et al. 2017; Kitaev et al. 2020, section 3): backward computes activations from the output.

    y1 = x1 + attention(x2)        x2 = y2 - feed_forward(y1)
    y2 = x2 + feed_forward(y1)     x1 = y1 - attention(x2)

So a stack of layers keeps its output and how each layer has cut its chunks, and nothing else, however deep it is.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from txl_dist.models.layers.dropout import Noise


class ReversibleLayer(Protocol):
    """A layer of two sublayers.

    The first one returns what its computation has chosen, and computes the same with that again; both draw what is
    random from the noise.
    """

    @property
    def attention(self) -> Callable[..., tuple[Tensor, Any]]:
        """Return the first sublayer."""

    @property
    def feed_forward(self) -> Callable[..., Tensor]:
        """Return the second sublayer."""


def add_layer(
    streams: tuple[Tensor, Tensor], layer: ReversibleLayer, shared: Any, noise: Noise | None
) -> tuple[tuple[Tensor, Tensor], Any]:
    """Compute a layer; return both streams, and what its first sublayer has chosen."""
    first, second = streams
    attended, chosen = layer.attention(second, shared, noise)
    first = first + attended
    return (first, second + layer.feed_forward(first, noise)), chosen


def run_reversibly(
    streams: Tensor,
    layers: Sequence[ReversibleLayer],
    shared: Any,
    noise: Noise | None,
    observer: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Compute layers and keep no activations of them.

    Args:
        streams: [..., 2 * d_model], the first and the second stream.
        observer: is called with the number of each layer, and the streams behind it.
    """
    result: Tensor = ReversibleStack.apply(streams, layers, shared, noise, observer)  # type: ignore[no-untyped-call]
    return result


class ReversibleStack(torch.autograd.Function):
    """Layers as one function.

    Parameters get their gradients while backward runs, by a backward of its own in each sublayer: each parameter once,
    as ZeRO wants it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        layers: Sequence[ReversibleLayer],
        shared: Any,
        noise: Noise | None,
        observer: Callable[[int, Tensor], None] | None,
    ) -> Tensor:
        """Keep the output, and what each layer has chosen."""
        first, second = streams.chunk(2, dim=-1)
        pair = first, second
        ctx.chosen = []
        for number, layer in enumerate(layers):
            pair, chosen = add_layer(pair, layer, shared, noise)
            ctx.chosen.append(chosen)
            if observer:
                observer(number, torch.cat(pair, dim=-1))
        output = torch.cat(pair, dim=-1)
        ctx.layers, ctx.shared, ctx.noise = layers, shared, noise
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Go back through the layers, each computed once more from its output."""
        (output,) = ctx.saved_tensors
        first, second = output.chunk(2, dim=-1)
        d_first, d_second = gradient.chunk(2, dim=-1)
        while ctx.chosen:
            chosen = ctx.chosen.pop()
            layer = ctx.layers[len(ctx.chosen)]
            second, d_first = step_back(second, first, d_second, d_first, layer.feed_forward, ctx.noise)
            attention = FirstOf(layer.attention)
            first, d_second = step_back(first, second, d_first, d_second, attention, ctx.shared, ctx.noise, chosen)
        return torch.cat([d_first, d_second], dim=-1), None, None, None, None


def step_back(
    total: Tensor, x: Tensor, d_total: Tensor, d_x: Tensor, sublayer: Callable[..., Tensor], *arguments: Any
) -> tuple[Tensor, Tensor]:
    """Go back through `total = before + sublayer(x)`; return `before`, and the whole gradient of x."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        added = sublayer(leaf, *arguments)
    torch.autograd.backward(added, d_total.to(added.dtype))
    assert leaf.grad is not None
    return total - added.detach(), d_x + leaf.grad


class FirstOf:
    """The first result of a function."""

    def __init__(self, function: Callable[..., tuple[Tensor, Any]]):
        self.function = function

    def __call__(self, *arguments: Any) -> Tensor:
        """Call the function."""
        return self.function(*arguments)[0]
