"""The lanes of examples: each example once in an epoch, whole, by one lane, whoever asks in which order."""

from collections import Counter

import numpy as np
import pytest

from txl_dist.data.examples import ExamplePlan, ExampleSource, Place
from txl_dist.data.lanes import Origin

DRAW = np.random.default_rng(1)
LENGTHS = {
    "single": np.ones(23, np.int64),
    "long": DRAW.integers(1, 6, 23),
    "one huge": np.array([1, 1, 40, 1, 1]),
    "fewer than lanes": np.array([2, 1, 3]),
}
every_length = pytest.mark.parametrize("segments", LENGTHS.values(), ids=LENGTHS)


def read(plan, steps):
    """What each lane reads, step by step."""
    return [[plan.place(lane, step) for step in range(steps)] for lane in range(plan.num_lanes)]


@every_length
@pytest.mark.parametrize("order", ["corpus", "documents"])
def test_an_epoch_reads_every_segment_of_every_example_once(segments, order):
    plan = ExamplePlan(segments, 4, 8, seed=3, order=order)
    first = plan.layout(0).steps
    second = first + plan.layout(1).steps
    for start, stop in ((0, first), (first, second)):
        places = [place for lane in read(plan, stop) for place in lane[start:] if place is not None]
        expected = Counter(Place(example, part) for example, count in enumerate(segments) for part in range(count))
        assert Counter(places) == expected


@every_length
def test_a_lane_reads_an_example_from_its_first_segment_to_its_last(segments):
    plan = ExamplePlan(segments, 4, 8, seed=3, order="documents")
    for lane in read(plan, 3 * plan.layout(0).steps):
        for before, after in zip(lane, lane[1:], strict=False):
            if before is not None and before.segment < segments[before.example] - 1:
                assert after == Place(before.example, before.segment + 1)
            elif after is not None:
                assert after.segment == 0


@every_length
def test_lanes_differ_by_less_than_an_example(segments):
    plan = ExamplePlan(segments, 4, 8)
    counts = [sum(place is not None for place in lane) for lane in read(plan, plan.layout(0).steps)]
    assert max(counts) - segments.sum() / 4 < segments.max()
    if segments.max() == 1:
        assert max(counts) - min(counts) <= 1


def test_any_step_is_found_without_the_steps_before_it():
    segments = LENGTHS["long"]
    steps = 3 * ExamplePlan(segments, 4, 8, seed=3, order="documents").layout(0).steps
    expected = read(ExamplePlan(segments, 4, 8, seed=3, order="documents"), steps)
    for step in (steps - 1, 0, steps // 2):
        plan = ExamplePlan(segments, 4, 8, seed=3, order="documents")
        assert [plan.place(lane, step) for lane in range(4)] == [lane[step] for lane in expected]


def test_the_order_is_that_of_seed_and_epoch():
    segments = np.ones(50, np.int64)
    orders = {}
    for seed in (1, 2):
        plan = ExamplePlan(segments, 1, 8, seed=seed, order="documents")
        orders[seed] = [place.example for place in read(plan, 100)[0]]
    assert orders[1][:50] != orders[1][50:] != orders[2][:50] != orders[1][:50]
    assert [place.example for place in read(ExamplePlan(segments, 1, 8), 50)[0]] == list(range(50))


def test_other_lanes_go_on_at_the_same_share_of_the_epoch():
    segments = np.ones(64, np.int64)
    plan = ExamplePlan(segments, 8, 16, origin=Origin(step=8, tokens=8 * 4 * 16))  # 8 steps of 4 lanes of 16
    assert plan.place(0, 8) == Place(4, 0)  # each of 8 lanes has 8 examples, and half of them are read
    assert plan.segments_read(8) == 0


def test_a_bad_step_is_described_by_its_example():
    plan = ExamplePlan(np.array([2, 1]), 2, 8)
    assert plan.describe(0, 1) == "segment 1 of example 0 of train" and plan.describe(1, 1) == "nothing"


def test_texts_are_a_source():
    texts = [(np.array([1, 2, 3]), np.array([4])), (np.array([5]), np.array([], np.int64))]
    source = ExampleSource.of_texts(texts)
    assert len(source) == 2 and source.first.tolist() == [3, 1] and source.second.tolist() == [1, 0]
    assert source.tokens(0).tolist() == [1, 2, 3, 4] and source.tokens(1).tolist() == [5]
