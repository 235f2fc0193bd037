"""Read tokens with memory, segment by segment, as training does."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from txl_dist.models.base import LanguageModel
from txl_dist.models.layers.state import Cache, KVCache, State, concat_lanes


class Memory:
    """What a model remembers of some lanes, and how far back: the state between two readings.

    Reading on from it takes its content, which is not copied: `copy` it first to read on from it twice.

    Attributes:
        position: int64 [lanes], the tokens that each lane has read.
    """

    def __init__(self, states: list[State], position: Tensor):
        self.position = position
        self._states: list[State] | None = states

    @classmethod
    def empty(cls, model: LanguageModel, lanes: int) -> "Memory":
        """Return the memory of lanes that begin."""
        return cls(model.empty_context(lanes), torch.zeros(lanes, dtype=torch.int64))

    @classmethod
    def join(cls, memories: Iterable["Memory"]) -> "Memory":
        """Join the lanes of several memories in one, and take their content."""
        parts = list(memories)
        return cls(concat_lanes(part.take() for part in parts), torch.cat([part.position for part in parts]))

    def take(self) -> list[State]:
        """Return the state of each layer, once.

        Raises:
            RuntimeError: where it has been taken before.
        """
        if self._states is None:
            raise RuntimeError("this memory has been read on from already; read on from a copy(), made before")
        states = self._states
        self._states = None
        return states

    @property
    def is_cached(self) -> bool:
        """Return whether all that is remembered are keys and values."""
        return all(isinstance(value, KVCache) for state in self._states or [] for value in state.values())

    def copy(self) -> "Memory":
        """Return a memory of the same content, to read on from it as well."""
        states = self.take()
        self._states = states
        copies = [
            {name: value.copy() if isinstance(value, Cache) else value for name, value in state.items()}
            for state in states
        ]  # a tensor is never written to
        return Memory(copies, self.position)


@torch.no_grad()
def read(model: LanguageModel, tokens: Tensor, memory: Memory) -> Iterator[tuple[Tensor, Memory]]:
    """Read tokens in segments of model.config.tgt_len.

    Args:
        tokens: int64 [lanes, length], which follow those that the memory is of.
        memory: is taken.

    Yields:
        For each segment the log-probabilities of the token after each, [lanes, segment, vocab_size], in nats; and the
        memory after it.
    """
    for batch in segments(model, tokens, memory.position):
        log_probs, states = model(batch, memory.take())
        memory = Memory(states, memory.position + batch["inputs"].size(1))
        yield log_probs, memory


@torch.no_grad()
def read_to_end(model: LanguageModel, tokens: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    """Read tokens as `read` does, but predict nothing until all are read.

    Returns:
        The log-probabilities of the token after the last one, [lanes, vocab_size], in nats; and the memory after it.
    """
    for batch in segments(model, tokens, memory.position):
        carry, states = model.through_layers(model.embed(model.inputs_of(batch)), memory.take())
        memory = Memory(states, memory.position + batch["inputs"].size(1))
    log_probs = model.predict(tuple(x[:, -1:] for x in carry), None)
    return log_probs[:, -1], memory


def segments(model: LanguageModel, tokens: Tensor, position: Tensor) -> Iterator[dict[str, Tensor]]:
    """Cut tokens, int64 [lanes, length], into what a model is called with; `position` of them were read before."""
    for segment in tokens.split(model.config.tgt_len, dim=1):
        length = segment.size(1)
        lookback = position[:, None] + torch.arange(length)
        yield {"inputs": segment, "lookback": lookback, "position": lookback}
        position = position + length
