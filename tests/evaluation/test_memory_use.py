"""What is logged of the memory, against slow computations by the definitions."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from txl_dist.data.index import Index
from txl_dist.data.segments import whole_split
from txl_dist.evaluation.likelihood import score
from txl_dist.runs.load import load_model
from txl_dist.tracking.schema import find_metric

LANES, TGT_LEN, MEM_LEN = 4, 16, 24
FILLING = 2  # segments
MEASURED = 4


@pytest.fixture(scope="module")
def trained(run, small, dataset, tmp_path_factory):
    """A run whose model has learnt to use its memory a little, its last metrics, and the first segments of valid."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    more = [f"data.num_lanes={LANES}", "optimizer.lr=1e-2", "train.max_steps=60", "train.eval_every=60"]
    run("txl_dist.train", *small, *more, "checkpoint.every=60", f"run.dir={folder}")
    return folder


@pytest.fixture(scope="module")
def logged(trained, metrics):
    (line,) = [line for line in metrics(trained) if "memory/gain" in line]
    return line


@pytest.fixture(scope="module")
def segments(dataset):
    loader = whole_split(Index.open(str(dataset)), "valid", LANES, TGT_LEN, "never", range(LANES))
    return [loader.read(step) for step in range(FILLING + MEASURED)]


def softmax_by_hand(attention, hidden, memory, lookback):
    """Return {(head, row, key): weight} of one lane: the formula of section 3.3, pair by pair, in float64."""
    states = torch.cat([memory, hidden]).double()
    query = attention.q_net.weight.double() @ hidden.double().T
    key = attention.kv_net.weight.double()[: query.size(0)] @ states.T
    d_head = attention.d_head
    frequency = 10000 ** (-torch.arange(0, hidden.size(1), 2).double() / hidden.size(1))
    weights = {}
    for head in range(attention.n_head):
        part = slice(head * d_head, (head + 1) * d_head)
        u, v = attention.u[head].double(), attention.v[head].double()
        for row in range(len(hidden)):
            scores = {}
            for at in range(len(states)):
                distance = len(memory) + row - at
                if 0 <= distance <= lookback[row]:
                    angle = distance * frequency
                    encoded = attention.r_net.weight.double() @ torch.cat([angle.sin(), angle.cos()])
                    q = query[part, row]
                    scores[at] = float((q + u) @ key[part, at] + (q + v) @ encoded[part]) / math.sqrt(d_head)
            total = sum(math.exp(value) for value in scores.values())
            weights |= {(head, row, at): math.exp(value) / total for at, value in scores.items()}
    return weights


def stretch(number):
    """Return the first number of the stretch 0, 1 to 3, 4 to 15, ... that a number is in."""
    return 0 if number == 0 else 4 ** int(math.log2(number) / 2)


@pytest.fixture(scope="module")
@torch.no_grad()
def expected(trained, segments):
    """Attention by the formula, written out, added up weight by weight."""
    model, _ = load_model(str(trained))
    sums = defaultdict(float)
    memory = model.empty_memory(LANES)
    for number, segment in enumerate(segments):
        carry = model.embed((torch.from_numpy(segment.inputs), torch.from_numpy(segment.lookback)))
        shared = model.shared(carry)
        new_memory = []
        for layer, (module, state) in enumerate(zip(model.layers, memory, strict=True)):
            for lane in range(LANES if number >= FILLING else 0):
                past = state["memory"][lane]
                weights = softmax_by_hand(module.attention, carry[0][lane], past, segment.lookback[lane])
                for (head, row, at), weight in weights.items():
                    distance = MEM_LEN + row - at
                    where = f"layer.{layer}.head.{head}"
                    sums["rows", where] += weight
                    sums[f"memory/distance/{where}.from.{stretch(distance)}"] += weight
                    if at < MEM_LEN:
                        sums[f"memory/share/{where}"] += weight
                        sums["on memory", layer] += weight
                        sums[f"memory/age/layer.{layer}"] += weight * distance
                        sums[f"memory/norm/layer.{layer}"] += weight * float(past[at].norm())
            carry, state = module(carry, state, shared)
            new_memory.append(state)
        memory = new_memory
    result = {}
    for key in [key for key in sums if isinstance(key, str)]:
        kind, _, where = key.removeprefix("memory/").partition("/")
        if kind in ("age", "norm"):
            result[key] = sums[key] / sums["on memory", int(where.removeprefix("layer."))]
        else:
            result[key] = sums[key] / sums["rows", where.partition(".from")[0]]
    result["memory/share"] = np.mean([value for key, value in result.items() if key.startswith("memory/share/")])
    return result


def test_attention_is_that_of_a_softmax_written_out(logged, expected):
    kinds = ("memory/share", "memory/distance/", "memory/age/", "memory/norm/")
    actual = {key: value for key, value in logged.items() if key.startswith(kinds)}
    assert actual == pytest.approx(expected, rel=1e-5)
    assert sum(value for key, value in actual.items() if "distance/layer.1.head.0" in key) == pytest.approx(1)


def test_the_gain_is_the_difference_of_two_evaluations(trained, logged, segments):
    """The model with memory, and the same weights in a model that has none."""
    device = torch.device("cpu")
    model, _ = load_model(str(trained))
    alone, _ = load_model(str(trained), changes={"mem_len": 0})
    filling, measured = (score(model, part, device, LANES) for part in (segments[:FILLING], segments))
    with_memory = (measured.nats - filling.nats) / (measured.tokens - filling.tokens)
    without = score(alone, segments[FILLING:], device, LANES).loss
    assert logged["memory/gain"] == pytest.approx(without - with_memory, abs=1e-6)


def test_the_gain_by_position_counts_each_position_once(trained, logged, segments):
    model, _ = load_model(str(trained))
    losses = {0: [], 1: [], 4: []}
    memory = model.empty_memory(LANES)
    alone, _ = load_model(str(trained), changes={"mem_len": 0})
    for number, segment in enumerate(segments):
        batch = {key: torch.from_numpy(getattr(segment, key)) for key in ("inputs", "targets", "lookback")}
        with torch.no_grad():
            nats, memory = model(batch, memory)
            nats_alone, _ = alone(batch, alone.empty_memory(LANES))
        if number >= FILLING:
            for start, of_stretch in losses.items():
                positions = [i for i in range(TGT_LEN) if (stretch(i) if i < 4 else 4) == start]
                of_stretch += (nats_alone - nats)[:, positions].flatten().tolist()
    assert {key for key in logged if key.startswith("memory/gain/")} == {f"memory/gain/from.{i}" for i in losses}
    for start, of_stretch in losses.items():
        assert logged[f"memory/gain/from.{start}"] == pytest.approx(np.mean(of_stretch), abs=1e-6)


def test_drift_is_the_cosine_of_a_lane_s_states_at_two_steps(run, small, trained, metrics, tmp_path):
    """The states that checkpoints hold after steps 59 and 60."""
    from txl_dist.checkpoint.format import find_checkpoint

    more = [f"data.num_lanes={LANES}", "optimizer.lr=1e-2", "train.max_steps=60", "train.eval_every=60"]
    every = ["checkpoint.every=1", "checkpoint.keep_last=2", "data.workers=2"]
    run("txl_dist.train", *small, *more, *every, f"run.dir={tmp_path}")
    before, after = (find_checkpoint(str(tmp_path), step).tensors("memory") for step in (59, 60))
    for layer in range(2):
        cosines = []
        for lane in range(LANES):
            old, new = (states[f"layer.{layer}.lane.{lane}"].flatten().double() for states in (before, after))
            cosines.append(float(old @ new / (old.norm() * new.norm())))
        actual = metrics(tmp_path)[-2][f"memory/drift/layer.{layer}"]
        assert actual == pytest.approx(np.mean(cosines), rel=1e-5)


def test_every_key_is_declared(logged):
    assert all(find_metric(key) for key in logged if key not in ("step", "tokens", "time"))


def test_a_split_that_is_too_short_has_no_metrics_of_memory(run, small, metrics, tmp_path):
    run("txl_dist.train", *small, "data.num_lanes=64", "train.max_steps=2", "train.eval_every=2", f"run.dir={tmp_path}")
    lines = metrics(tmp_path)
    assert "valid/loss" in lines[1] and not any(key.startswith("memory/gain") for key in lines[1])


@pytest.mark.parametrize("every, at", [("0", []), ("4", [4, 8, 12, 16, 20]), ("null", [10, 20])])
def test_it_is_measured_when_asked(run, small, metrics, tmp_path, every, at):
    run("txl_dist.train", *small, f"tracking.memory_every={every}", f"run.dir={tmp_path}")
    assert [line["step"] for line in metrics(tmp_path) if "memory/share" in line] == at


def test_a_model_without_memory_has_no_metrics_of_it(run, small, metrics, tmp_path):
    run("txl_dist.train", *small, "model.mem_len=0", f"run.dir={tmp_path}")
    assert not any(key.startswith("memory/") for line in metrics(tmp_path) for key in line)


def test_looking_changes_no_loss_by_a_bit(run, small, metrics, tmp_path):
    for every in ("0", "3"):
        run("txl_dist.train", *small, f"tracking.memory_every={every}", f"run.dir={tmp_path / every}")
    one, two = ([line["train/loss"] for line in metrics(tmp_path / every) if "train/loss" in line] for every in "03")
    assert one == two
