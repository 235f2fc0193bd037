"""Compiled layers (engine.compile=true): few graphs for all of them, and none is compiled after the first step."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from txl_dist.engine.engine import resolve_compile

COMPILED_RUNS = Path(__file__).parent / "compiled_runs.py"
DROPOUT = ["model.dropout=0.1", "model.dropatt=0.1"]
XLNET = ["model=xlnet", "model.reuse_len=8", "objective=permutation_lm", "objective.num_predict=5"]
XLNET += ["objective.perm_size=4", "objective.pairs=false", "objective.spans=tokens"]
# The graphs that all layers share: with attention left out, before it, behind it, and the feed-forward sublayer. Layers
# that differ have attention of their own: the first one with absolute positions, and the last one of XLNet.
RUNS = {
    "documents": (3, ["data.order=documents", "data.reset_memory=document", "tracking.watch_every=2"]),
    "accumulated": (3, ["engine.gradient_accumulation=4", "engine.activation_checkpointing=true"]),
    "bf16": (3, ["model.variational=true", "engine.precision=bf16", "++evaluation={tgt_len: 9, mem_len: 40}"]),
    "shaw": (3, ["model.attention=shaw", "model.pre_lnorm=true", "engine.zero_stage=0"]),
    "absolute": (5, ["model.attention=absolute", "model.same_length=true", "model.cutoffs=[60,110]"]),
    "xlnet": (2, XLNET),
}


@pytest.fixture(scope="module")
def compiled(run, small, tmp_path_factory):
    """The graphs after each step of each run, which evaluates, shows its memory's use and samples in between."""
    folder = tmp_path_factory.mktemp("compiled")
    short = ["model.n_layer=4", "train.max_steps=5", "train.eval_every=2", "checkpoint.every=5"]
    options = [*DROPOUT, *short, "engine.compile=true", "tracking.prompts=[the]", "tracking.sample_tokens=5"]
    jobs = [[*small, *own, *options, f"run.dir={folder / name}"] for name, (_, own) in RUNS.items()]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = run(COMPILED_RUNS, folder / "jobs.json")
    assert done.stdout.count("compiled layers") == len(RUNS)
    return {name: json.loads((folder / name / "graphs.json").read_text()) for name in RUNS}


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(
    "given, stage, on_gpu", [(True, 1, True), (False, 1, False), ("auto", 2, True), ("auto", 3, False)]
)
def test_auto_compiles_on_gpus_where_weights_stay(monkeypatch, given, stage, on_gpu, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    engine = SimpleNamespace(compile=given, zero_stage=stage)
    assert resolve_compile(engine) is (on_gpu and (gpu or given is True))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_all_layers_share_few_graphs_and_none_is_compiled_again(compiled, name):
    graphs, _ = RUNS[name]
    assert compiled[name] == [graphs] * 6
