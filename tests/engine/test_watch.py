"""What is logged of a step's inside, beside what torch computes of the same step from the checkpoints around it."""

import json
import math
from pathlib import Path

import pytest
import torch

from txl_dist.checkpoint.format import directory, open_checkpoint
from txl_dist.config.parse import parse_config
from txl_dist.config.schema import TrainJob
from txl_dist.data.index import Index
from txl_dist.data.lanes import BEGINNING
from txl_dist.engine.engine import build_model
from txl_dist.engine.watch import part_of
from txl_dist.objectives.causal_lm import CausalLM
from txl_dist.tracking.schema import find_metric

MANY_RUNS = Path(__file__).parents[1] / "distributed/many_runs.py"
RUNS = {
    "zero-0": ["engine.zero_stage=0"],
    "zero-1-accumulated": ["engine.zero_stage=1", "engine.gradient_accumulation=4"],
    "not-clipped": ["optimizer.clip=0", "model.cutoffs=[60,110]", "model.div_val=2"],
}
EVERY, LAST = 3, 7
QUANTITIES = ("weights", "gradients", "updates", "activations_rms", "activations_max")


@pytest.fixture(scope="module")
def runs(run, small, tmp_path_factory):
    """Runs that log every other step, and watch every third."""
    folder = tmp_path_factory.mktemp("watch")
    short = [f"train.max_steps={LAST}", "train.eval_every=7", "checkpoint.every=1", "checkpoint.keep_last=20"]
    watched = [*small, *short, "tracking.log_every=2", f"tracking.watch_every={EVERY}"]
    jobs = [[*watched, *options, f"run.dir={folder / name}"] for name, options in RUNS.items()]
    (folder / "jobs.json").write_text(
        json.dumps([*jobs, [*watched, "tracking.watch_every=null", f"run.dir={folder}/off"]])
    )
    done = run(MANY_RUNS, folder / "jobs.json")
    (folder / "printed").write_text(done.stdout)
    return folder


def watched(line, quantity):
    """The values of a quantity in a line of the log, by part."""
    start = f"watch/{quantity}/"
    return {key.removeprefix(start): value for key, value in line.items() if key.startswith(start)}


def read_step(run_dir, step):
    """A model after the backward pass of a step, by plain torch; its weights after the step; each layer's output."""
    before, after = (open_checkpoint(directory(run_dir, number)) for number in (step - 1, step))
    job = parse_config(TrainJob, before.config)
    index = Index.open(job.data.dir)
    model = build_model(job, index.vocab_size, None)
    before.load_weights(model)
    lanes = range(job.data.num_lanes)
    remembered = before.tensors("memory")
    (segment,) = CausalLM().segments(job, index, lanes, BEGINNING, step - 1, step)
    batch = CausalLM().batch(segment)
    carry = model.embed(model.inputs_of(batch))
    shared = model.shared(carry)
    outputs = []
    for number, layer in enumerate(model.layers):
        memory = torch.stack([remembered[f"layer.{number}.lane.{lane}"] for lane in lanes])
        carry, _ = layer(carry, {"memory": memory}, shared, None)
        outputs.append(carry[0].detach())
    model.predict(carry, batch["targets"]).mean().backward()
    return model, after.tensors("weights"), outputs


def norms(tensors):
    """The norm of each part, of all its tensors together."""
    parts = {}
    for name, tensor in tensors.items():
        parts.setdefault(part_of(name), []).append(tensor.detach().double().flatten())
    return {part: float(torch.cat(pieces).norm()) for part, pieces in parts.items()}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("step", [3, 6])
def test_every_number_is_what_torch_computes(runs, metrics, name, step):
    """Each tolerance is that of the numbers themselves: a gradient and an update have fewer digits than a weight."""
    (line,) = [line for line in metrics(runs / name) if line["step"] == step]
    model, after, outputs = read_step(runs / name, step)
    parameters = dict(model.named_parameters())
    gradients = {key: parameter.grad for key, parameter in parameters.items()}
    updates = {key: after[key] - parameter for key, parameter in parameters.items()}
    assert watched(line, "weights") == pytest.approx(norms(after), rel=1e-7)
    assert watched(line, "updates") == pytest.approx(norms(updates), rel=1e-7)
    assert watched(line, "gradients") == pytest.approx(norms(gradients), rel=1e-5)
    rms = {f"layer.{number}": float(output.double().square().mean().sqrt()) for number, output in enumerate(outputs)}
    largest = {f"layer.{number}": float(output.abs().max()) for number, output in enumerate(outputs)}
    assert watched(line, "activations_rms") == pytest.approx(rms, rel=1e-6)
    assert watched(line, "activations_max") == pytest.approx(largest, rel=1e-6)
    assert line["watch/seconds"] > 0
    if name != "not-clipped":
        assert math.hypot(*watched(line, "gradients").values()) > 0.25  # what optimizer.clip has left of it
    if step % 2 == 0:
        assert math.hypot(*watched(line, "gradients").values()) == pytest.approx(line["train/grad_norm"], rel=1e-6)


def test_parts_are_the_layers_and_what_is_beside_them(runs, metrics):
    """The softmax has a bias of its own; its table is the embedding's."""
    line = metrics(runs / "zero-0")[1]
    parts = {quantity: set(watched(line, quantity)) for quantity in QUANTITIES}
    layers = {"layer.0", "layer.1"}
    assert parts["weights"] == parts["gradients"] == parts["updates"] > layers | {"embedding"}
    assert parts["activations_rms"] == parts["activations_max"] == layers


def test_watched_steps_are_logged_and_no_others(runs, metrics):
    """A step that is not due otherwise has a line for charts alone: nothing of it is printed."""
    lines = metrics(runs / "zero-0")
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 7, 7]  # the last one is the test split's
    keys = {line["step"]: {key for key in line if key.startswith("watch/")} for line in lines}
    assert keys[3] == keys[6] and not keys[2] | keys[4] | keys[7]
    assert set(lines[1]) == keys[3] | {"step", "tokens", "time"}
    assert {find_metric(key).key.split("/")[1] for key in keys[3]} == {*QUANTITIES, "seconds"}
    printed = (runs / "printed").read_text()
    assert "step 2/7  train loss" in printed and "step 3/7" not in printed


def test_by_default_nothing_is_watched(runs, metrics):
    assert not [key for line in metrics(runs / "off") for key in line if key.startswith("watch/")]
