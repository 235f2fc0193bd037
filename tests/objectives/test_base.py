"""Segments that are scored in micro-batches have the loss of segments that are scored in one piece."""

import numpy as np
import pytest
import torch

from txl_dist.data.segments import Segment
from txl_dist.evaluation.likelihood import read_segments, score
from txl_dist.models.transformer_xl import TransformerXL
from txl_dist.objectives.causal_lm import CausalLM

CPU = torch.device("cpu")
LANES = 4
VOCAB = 30


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_do_not_change_the_loss(make_config, micro_batches):
    """Each remembers its own lanes: the weights are large, so that what it remembers matters."""
    torch.manual_seed(0)
    model = TransformerXL(make_config(init_std=0.5), VOCAB).double().eval()
    tokens = np.random.default_rng(1).integers(1, VOCAB, (LANES, 15))
    segments = []
    for step, start in enumerate((0, 5, 10)):
        part = tokens[:, start : start + 5]
        segments.append(Segment(step, part, part, np.tile(np.arange(start, start + 5), (LANES, 1))))
    caches = [model.empty_cache(LANES // micro_batches, CPU) for _ in range(micro_batches)]
    nats, scored = read_segments(model, CausalLM(), caches, segments, CPU)
    expected = score(model, segments, CPU, LANES)
    assert scored == expected.tokens == tokens.size
    assert nats.item() == pytest.approx(expected.nats, rel=1e-12)
