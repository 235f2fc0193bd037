"""What a checkpoint holds, printed by one command."""

import json

import pytest

from txl_dist.checkpoint.format import latest


@pytest.fixture(scope="module")
def pipelined(run, small, tmp_path_factory):
    """Train a run of two pipeline stages, with checkpoints of steps 10 and 20."""
    run_dir = tmp_path_factory.mktemp("inspect") / "run"
    split = ["engine.pipeline_stages=2", "engine.gradient_accumulation=4", "engine.stage_layers=[1,1]"]
    run("txl_dist.train", *small, f"run.dir={run_dir}", *split, processes=2)
    return run_dir


def test_json_agrees_with_the_files(pipelined, run):
    summary = json.loads(run("txl_dist.inspect", f"run={pipelined}", "format=json", "verify=true").stdout)
    checkpoint = latest(pipelined)
    assert (summary["step"], summary["max_steps"], summary["other_steps"]) == (20, 20, [10])
    assert summary["tokens"] == 20 * 8 * 16
    assert (summary["num_lanes"], summary["tgt_len"], summary["lanes_since"]) == (8, 16, 0)
    split = summary["written_by"]
    assert (split["ranks"], split["pipeline_stages"], split["gradient_accumulation"]) == (2, 2, 4)
    assert (split["zero_stage"], split["precision"], split["stage_layers"]) == (1, "fp32", [1, 1])
    for kind in ("weights", "optimizer", "memory"):
        tensors = checkpoint.tensors(kind)
        inventory = summary["holds"][kind]
        assert inventory["tensors"] == len(tensors)
        assert inventory["numbers"] == sum(tensor.numel() for tensor in tensors.values())
        assert inventory["files"] == 2
        assert inventory["bytes"] == sum(path.stat().st_size for path in checkpoint.path.glob(f"{kind}-*"))
    assert summary["holds"]["memory"]["tensors"] == 2 * 8  # layers x lanes


def test_the_table_shows_step_lanes_and_split(pipelined, run):
    printed = run("txl_dist.inspect", f"run={pipelined}", "checkpoint=10").stdout
    for words in (
        "10 of 20, 1,280 tokens",
        "8 of 16 tokens per step",
        "2 pipeline stages",
        "4 micro-batches",
        "step 20",
    ):
        assert words in printed, words


def test_the_best_has_the_lowest_loss_on_valid(pipelined, run, metrics):
    printed = json.loads(run("txl_dist.inspect", f"run={pipelined}", "format=json", "checkpoint=best").stdout)
    losses = {line["step"]: line["valid/loss"] for line in metrics(pipelined) if "valid/loss" in line}
    assert (printed["step"], printed["valid_loss"]) == (min(losses, key=losses.get), min(losses.values()))


def test_damage_is_reported(pipelined, run):
    path = next((latest(pipelined).path).glob("memory-*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not run("txl_dist.inspect", f"run={pipelined}").stderr  # nothing is read
    done = run("txl_dist.inspect", f"run={pipelined}", "verify=true")
    assert f"checkpoint of step 20 skipped: {path}" in done.stderr and "10 of 20" in done.stdout
    done = run("txl_dist.inspect", f"run={pipelined}", "verify=true", "checkpoint=20", expect=2)
    assert path.name in done.stderr and "Traceback" not in done.stderr
    content[-1] ^= 1
    path.write_bytes(content[:-1])
    assert path.name in run("txl_dist.inspect", f"run={pipelined}").stderr
