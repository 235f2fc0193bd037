"""Score tokens from both sides: log P(token | the text before it, and the rest of its segment behind it)."""

import numpy as np
import torch
from torch import Tensor

from txl_dist.errors import UserError
from txl_dist.models.base import Batch, LanguageModel
from txl_dist.models.layers.state import concat_lanes

ROWS = 16  # tokens that are scored together


@torch.no_grad()
def log_probs_from_both_sides(model: LanguageModel, tokens: Tensor) -> list[float]:
    """Score each token but the first.

    A text longer than tgt_len is read in segments of equal lengths. A token sees its whole segment but itself, and what
    the model remembers of those before.

    Args:
        tokens: int64 [length], at least two.

    Returns:
        The log-probabilities, in nats.

    Raises:
        UserError: where the model predicts from left to right only.
    """
    if "positions" not in model.inputs:
        raise UserError(f"context=both: {model.config.name} predicts from left to right only; give context=left")
    count = -(-len(tokens) // model.config.tgt_len)
    memory = model.empty_memory(1)
    log_probs: list[float] = []
    read = 0
    for part in np.array_split(np.arange(len(tokens)), count):
        segment = tokens[torch.from_numpy(part)]
        for places in torch.arange(len(segment)).split(ROWS):
            states = concat_lanes([memory] * len(places))
            nats, _ = model(hidden_one_by_one(segment, places, read), states)
            log_probs += (-nats[:, 0]).tolist()
        lookback = torch.arange(read, read + len(segment))[None]
        _, memory = model({"inputs": segment[None], "lookback": lookback}, memory)
        read += len(segment)
    return log_probs[1:]


def hidden_one_by_one(segment: Tensor, places: Tensor, read: int) -> Batch:
    """Make a batch whose row i predicts the token at place i from all others.

    Args:
        segment: int64 [length].
        places: int64 [rows].
        read: tokens before the segment.
    """
    rows = len(places)
    length = len(segment)
    nothing = torch.zeros(rows, length, dtype=torch.int64)
    return {
        "inputs": segment.expand(rows, length),
        "lookback": torch.arange(read, read + length).expand(rows, length),
        "rank": nothing.scatter(1, places[:, None], 1),
        "segment": nothing,
        "direction": torch.ones(rows, 1, dtype=torch.int64),
        "positions": places[:, None],
        "targets": segment[places][:, None],
    }
