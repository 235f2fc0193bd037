"""Read on by one token of each lane at a time: on a GPU by a CUDA graph, which is launched as one piece.

A token of a few lanes is hundreds of kernels, each so short that the CPU could not launch them as fast as they end. A
graph records them once, with the addresses of all that they read and write, and knows nothing of Python. So nothing may
move, and nothing may depend on a number that Python would have to wait for, or that changes from token to token.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from txl_dist.evaluation.reading import Memory, read
from txl_dist.models.base import LanguageModel
from txl_dist.models.layers.state import FixedKVCache, KVCache, State


def token_reader(model: LanguageModel, memory: Memory) -> Callable[[Tensor], Tensor]:
    """Return a function that reads one more token of each lane after a memory, which it takes.

    The function takes int64 [lanes], and returns the log-probabilities of the next token, [lanes, vocab_size], in nats,
    which hold until it is called again.
    """
    if memory.is_cached and next(model.parameters()).is_cuda:
        return TokenGraph(model, memory)
    return eager_reader(model, memory)


def eager_reader(model: LanguageModel, memory: Memory) -> Callable[[Tensor], Tensor]:
    """Return such a function without a graph."""

    def read_token(tokens: Tensor) -> Tensor:
        nonlocal memory
        [(log_probs, memory)] = read(model, tokens.cpu()[:, None], memory)
        return log_probs[:, -1]

    return read_token


class TokenStep:
    """Read one token of each lane; everything that is read or written stays where it is.

    Args:
        model: whose memory in evaluation are key/value caches.

    Attributes:
        tokens: int64 [lanes, 1], what is read next.
        lookback: int64 [lanes, 1], how many tokens each lane has read before.
        states: of each layer, caches that are written in place.
    """

    def __init__(self, model: LanguageModel, lanes: int):
        device = next(model.parameters()).device
        self.model = model
        self.tokens = torch.zeros(lanes, 1, dtype=torch.int64, device=device)
        self.lookback = torch.zeros_like(self.tokens)
        self.states = [fixed(state) for state in model.empty_cache(lanes)]

    def load(self, memory: Memory) -> None:
        """Begin after a memory, which is copied."""
        self.lookback.copy_(memory.position[:, None])
        for cache, read_before in zip(caches(self.states), caches(memory.take()), strict=True):
            cache.states.copy_(read_before.remembered)

    def read(self) -> Tensor:
        """Read `tokens`; return the log-probabilities of the next one, [lanes, vocab_size], in nats."""
        log_probs, _ = self.model({"inputs": self.tokens, "lookback": self.lookback}, self.states)
        self.lookback += 1
        return log_probs[:, -1]


def fixed(state: State) -> State:
    """Return a layer's caches as those that are written in place."""
    return {name: FixedKVCache(cache.remembered) for name, cache in state.items() if isinstance(cache, KVCache)}


def caches(states: list[State]) -> Iterator[KVCache]:
    """Yield the caches of all layers."""
    for state in states:
        yield from (cache for cache in state.values() if isinstance(cache, KVCache))


class TokenGraph:
    """A `TokenStep` on a GPU, recorded once."""

    WARM_UP = 2  # tokens read before, in which kernels are compiled or chosen, and constants computed

    def __init__(self, model: LanguageModel, memory: Memory):
        self.step = TokenStep(model, len(memory.position))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                self.step.read()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile, such as NCCL's, does not matter.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.log_probs = self.step.read()
        self.step.load(memory)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Read int64 [lanes]; see `token_reader`."""
        self.step.tokens.copy_(tokens[:, None])
        self.graph.replay()
        return self.log_probs
