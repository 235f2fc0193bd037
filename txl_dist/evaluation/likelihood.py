"""Losses of a model: of segments read with memory, and of single tokens, each in a context of its own."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from txl_dist.data.lanes import ResetMemory
from txl_dist.data.segments import Segment
from txl_dist.models.base import Batch, Carry, LanguageModel
from txl_dist.models.layers.state import State
from txl_dist.objectives.base import Objective, Score, micro_batches
from txl_dist.objectives.causal_lm import CausalLM


def score(model: LanguageModel, segments: Iterable[Segment], device: torch.device, lanes: int) -> Score:
    """Read `segments` of some lanes in order, from empty memories; targets that are NOT_SCORED count nothing."""
    nats, tokens = read_segments(model, CausalLM(), [model.empty_cache(lanes, device)], segments, device)
    return Score(nats.item(), tokens)


@torch.no_grad()
def read_segments(
    forward: Callable[..., tuple[Tensor, Any]],
    objective: Objective,
    caches: list[list[State]],
    segments: Iterable[Segment],
    device: torch.device,
    show: Callable[[Tensor, Batch], None] | None = None,
) -> tuple[Tensor, int]:
    """Read segments in order, each micro-batch of lanes with a memory of its own.

    Args:
        forward: runs the model, as `LanguageModel.forward`.
        caches: the empty memory of each micro-batch; they are used up.
        device: of the losses.
        show: is called with what the model returns for each micro-batch, as the losses [lanes, targets], and with the
            micro-batch.

    Returns:
        The nats, float64, and how many targets are scored.
    """
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    for segment in segments:
        batch = objective.batch(segment)
        for number, (_, micro_batch) in enumerate(micro_batches(batch, len(caches))):
            result, caches[number] = forward(micro_batch, caches[number])
            nats += objective.losses(result).double().sum()
            if show:
                show(result, micro_batch)
        tokens += int(objective.is_scored(batch["targets"]).sum())
    return nats, tokens


@torch.no_grad()
def losses_in_context(
    model: LanguageModel,
    stream: np.ndarray,
    positions: np.ndarray,
    context: int,
    eos: int,
    starts: np.ndarray | None = None,
    reset_memory: ResetMemory = "never",
) -> np.ndarray:
    """Compute -log P(x_t | x_t-1, ..., x_t-context) for the tokens at some positions, each from scratch.

    A model with memory reads the context in segments of tgt_len tokens, one without memory in a single segment.

    Args:
        stream: int64 [tokens].
        positions: int64 [n], computed as one batch.
        context: in tokens.
        eos: what is read before the first token of each document.
        starts: uint64 [documents + 1], as Split.document_starts; None: the stream is one document.
        reset_memory: "document": no context reaches back beyond the token's document.

    Returns:
        float64 [n], in nats.
    """
    padded = np.concatenate([np.full(context, eos), stream])
    offsets = np.arange(context)
    before = padded[positions[:, None] + offsets]
    following = positions[:, None] - (context - 1 - offsets)  # the token behind each input
    # int64 whatever the file says: numpy would compare unsigned positions as floats.
    begins = np.zeros(1, np.int64) if starts is None else np.asarray(starts).view(np.int64)
    begin = begins[np.searchsorted(begins, following, side="right") - 1]
    before[begin == following] = eos
    inputs = torch.from_numpy(before)
    history = following - (begin[:, -1:] if reset_memory == "document" else 0)  # tokens before each input
    lookback = torch.from_numpy(np.minimum(history, offsets).clip(min=0))
    targets = torch.from_numpy(stream[positions])[:, None]

    length = model.config.tgt_len if model.config.lookback else context
    memory = model.empty_cache(len(positions))
    carry: Carry = ()
    # The first segment may be shorter: the last one ends with the context.
    for end in reversed(range(context, 0, -length)):
        part = slice(max(0, end - length), end)
        batch = {"inputs": inputs[:, part], "lookback": lookback[:, part]}
        carry, memory = model.through_layers(model.embed(model.inputs_of(batch)), memory)
    last = tuple(field[:, -1:] for field in carry)
    return model.predict(last, targets)[:, 0].double().cpu().numpy()
