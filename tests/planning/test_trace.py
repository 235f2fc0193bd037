"""What a model keeps in memory and moves, found by its own code."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from txl_dist.cli import CONF
from txl_dist.config.parse import parse_config
from txl_dist.config.schema import PlanJob
from txl_dist.planning.dataset import Dataset
from txl_dist.planning.planner import Planner
from txl_dist.planning.trace import Recorder, chain

SMALL = ["model.n_layer=4", "model.d_model=32", "model.n_head=2", "model.d_inner=64", "model.tgt_len=16"]
SMALL += ["model.mem_len=16", "data.num_lanes=4", "vocab_size=300"]


def planner(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        values = OmegaConf.to_container(compose("plan", [*SMALL, *overrides]), resolve=True)
    return Planner(parse_config(PlanJob, values), Dataset(300, None, "given"))


def test_storages_count_from_when_they_come_until_they_go():
    recorder = Recorder(torch.device("cpu"))
    with recorder:
        kept = torch.zeros(100)
        recorder.phase = 1
        gone = kept + 1
        view = gone[10:]
        del gone
        recorder.phase = 2
        del view
        kept += 1
    assert recorder.levels(set()) == {0: (0, 400, 400), 1: (400, 800, 800), 2: (800, 800, 400)}
    assert recorder.levels({0})[1] == (0, 400, 400)
    assert recorder.operators[1] == 1 and recorder.moved[1] == 800


@pytest.mark.parametrize("device", ["cpu", "H100"])
@pytest.mark.parametrize("model", [["model=transformer_xl"], ["model=xlnet", "objective=permutation_lm"]])
def test_every_architecture_is_traced_as_it_is(device, model):
    permuted = ["model.reuse_len=8", "objective.num_predict=4", "objective.perm_size=4"] if len(model) > 1 else []
    found = planner(*model, *permuted, f"device={device}")
    parts = found.traces(4, False)
    assert len(parts) == 6 and len({part.held for part in parts[2:5]}) == 1
    assert all(part.held and part.backward_peak >= part.held and part.operators for part in parts[1:])
    assert sum(part.state for part in parts) == 4 * 4 * 16 * 32 * (2 if device == "H100" else 4)


def test_checkpointing_keeps_what_enters_a_layer_and_computes_the_rest_again():
    found = planner("device=cpu")
    stored, recomputed = (found.traces(4, checkpointing)[3] for checkpointing in (False, True))
    carry = 4 * 16 * 32 * 4
    assert recomputed.held == carry < stored.held
    assert recomputed.backward_peak > 0.9 * stored.held
    assert recomputed.backward_moved == stored.backward_moved + stored.forward_moved


def test_layers_are_alike_where_their_neighbours_are():
    assert chain(planner("device=cpu").model(False)) == [0, 1, 1, 1]
    assert chain(planner("device=cpu", "model.attention=absolute", "model.mem_len=0").model(False)) == [0, 1, 2, 2]


def test_memory_does_not_depend_on_what_is_traced_before():
    found = planner("device=cpu")
    first = found._trace(2, False)
    found._trace(4, True)
    assert found._trace(2, False) == first
