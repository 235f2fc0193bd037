"""Outputs that TensorFlow has computed of the authors' checkpoints: numbers that owe nothing to PyTorch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from txl_dist.config.schema import ConvertJob
from txl_dist.conversion.importing import model_config
from txl_dist.conversion.sources import open_import_source
from txl_dist.models.registry import build

DATA = Path(__file__).parents[3] / "shared" / "data" / "xlnet"
LENGTH = 5
LENGTHS = {"tgt_len": LENGTH, "mem_len": LENGTH, "reuse_len": LENGTH}

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the authors' checkpoints are not here")


def load(name):
    """The model of a checkpoint, and its inputs and outputs."""
    folder = DATA / name
    source = open_import_source(folder)
    job = ConvertJob(run="x", from_=str(folder), to=None, tokenizer_from=None, checkpoint=None, model=LENGTHS)
    config = model_config(job, source)
    model = build(config, source.vocab_size).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(source.weights(config)[key])
    return model, {path.stem: torch.from_numpy(np.load(path)) for path in folder.glob("*.npy")}


def read(model, given, positions):
    """Read from left to right, with all of the memory that was given; predict what stands at some positions."""
    lanes = len(given["input_ids"])
    at = torch.arange(LENGTH).expand(lanes, LENGTH)
    memory = [{"memory": given[f"mems_{layer}"].float()} for layer in range(len(model.layers))]
    fields = {
        "inputs": given["input_ids"],
        "rank": at,
        "lookback": torch.full_like(at, 10**6),
        "segment": given["seg_ids"],
        "direction": torch.ones(lanes, 1, dtype=torch.int64),
        "positions": positions.expand(lanes, -1),
    }
    with torch.no_grad():
        return model(fields, memory)


def test_predictions_and_memories():
    model, given = load("tf_pre")
    for positions in (torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 4])):
        log_probs, memory = read(model, given, positions)
        is_predicted = given["input_mask"][:, positions] == 1
        expected = given["pre_output"][:, positions]
        assert is_predicted.any() and (log_probs.exp() - expected)[is_predicted].abs().max() < 1e-6
        for layer, state in enumerate(memory):
            torch.testing.assert_close(state["memory"], given[f"pre_new_mems_{layer}"], rtol=0, atol=1e-6)


def test_memories_of_a_model_for_fine_tuning():
    model, given = load("tf_tune")
    _, memory = read(model, given, torch.tensor([0]))
    for layer, state in enumerate(memory):
        torch.testing.assert_close(state["memory"], given[f"tune_new_mems_{layer}"], rtol=0, atol=1e-6)
