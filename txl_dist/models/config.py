"""What the config sections of all architectures have in common. Each stands beside its model, and needs no torch."""

from collections.abc import Iterator
from typing import Annotated

from pydantic.dataclasses import dataclass

from txl_dist.config.types import EVALUATION, LANES, NEVER, SCHEMA, MayChange, Size, may_change


@dataclass(config=SCHEMA, frozen=True, kw_only=True)
class ModelConfig:
    """The hyper-parameters that every architecture has; its own section extends it.

    A key whose type does not say what may change it (config/types.py) never changes. A key that checkpoints of earlier
    versions lack has a default: the value that they were trained with.
    """

    name: str
    n_layer: Size  # layers, each with a state of its own
    tgt_len: Annotated[Size, LANES]  # tokens in a segment

    @classmethod
    def may_change(cls) -> dict[str, MayChange]:
        """Return for each key what may change it."""
        return may_change(cls, unmarked=NEVER)

    @classmethod
    def read_otherwise(cls) -> list[str]:
        """List the keys that may have other values where a trained model is read."""
        return [key for key, when in cls.may_change().items() if when in (EVALUATION, LANES)]

    @property
    def attention_backends(self) -> tuple[str, ...]:
        """Return what engine.attention may be beside auto."""
        return ()

    @property
    def lookback(self) -> int:
        """Return how many tokens before a segment a layer's state may be of; 0: the model has no memory."""
        return 1

    @property
    def reads_both_ways(self) -> bool:
        """Return whether a position of an example sees those behind it."""
        return False

    @property
    def note(self) -> str:
        """Return what people should know of losses of this model; as a rule nothing."""
        return ""

    @property
    def fewest_tensors(self) -> int:
        """Return a lower limit of the number of parameter tensors, without building the model."""
        return self.n_layer

    def problems(self, section: str = "model") -> Iterator[str]:
        """Yield what does not fit together, by the keys of the section in which it is given."""
        yield from ()

    def vocabulary_problems(self, vocab_size: int) -> Iterator[str]:
        """Yield what does not fit a vocabulary of this size."""
        yield from ()

    def without_memory(self) -> "ModelConfig | None":
        """Return the model that reads each segment alone; None where there is no such model."""
        return None
