"""Segments: the lanes' tokens, each input the token before its target, whatever reads them ahead."""

import shutil

import numpy as np
import pytest

from txl_dist.data.index import Index
from txl_dist.data.lanes import EvaluationPlan, LanePlan, LaneSplit
from txl_dist.data.samples import SampleReader
from txl_dist.data.segments import NOT_SCORED, Segments
from txl_dist.errors import UserError


@pytest.fixture(scope="module")
def index(dataset):
    return Index.open(str(dataset))


@pytest.fixture(scope="module")
def tokens(index):
    """The complete training stream."""
    return SampleReader(index, "train").tokens(0, index.splits["train"].tokens).astype(np.int64)


def training(index, lanes=range(8), start=0, stop=40, workers=1, **options):
    plan = LanePlan(index.splits["train"].document_starts, 8, 16, seed=3, **options)
    return Segments(plan, SampleReader(index, "train"), lanes, index.eos, start, stop, workers)


def test_lanes_read_on_from_segment_to_segment(index, tokens):
    segments = list(training(index))
    assert [segment.step for segment in segments] == list(range(40))
    for lane in range(8):
        begin = lane * len(tokens) // 8
        expected = np.take(tokens, np.arange(begin - 1, begin + 40 * 16), mode="wrap")
        if lane == 0:
            expected[0] = index.eos
        assert np.array_equal(np.concatenate([segment.targets[lane] for segment in segments]), expected[1:])
        assert np.array_equal(np.concatenate([segment.inputs[lane] for segment in segments]), expected[:-1])


def test_reach_of_a_stream_that_never_resets_is_its_length(index):
    for segment in training(index, stop=3):
        assert np.array_equal(segment.lookback, np.tile(segment.step * 16 + np.arange(16), (8, 1)))


@pytest.mark.parametrize("order", ["corpus", "documents"])
def test_reach_ends_where_a_document_begins(index, order):
    """Followed by hand along a lane: one more at each token, none at a document's first."""
    starts = set(index.splits["train"].document_starts.tolist())
    segments = training(index, stop=60, order=order, reset_memory="document")
    for lane in range(8):
        positions = [
            position
            for step in range(60)
            for span in segments.plan.spans(lane, step)
            for position in range(span.position, span.position + span.length)
        ]
        expected, lookback = [], -1
        for before, position in zip([None, *positions], positions, strict=False):
            follows = before is None or position == before + 1
            lookback = lookback + 1 if follows and position not in starts else 0
            expected.append(lookback)
        assert np.concatenate([segment.lookback[lane] for segment in segments]).tolist() == expected


@pytest.mark.parametrize("options", [{}, {"order": "documents", "reset_memory": "document"}])
def test_workers_starts_and_ranks_change_nothing(index, options):
    all_at_once = list(training(index, **options))
    many = list(training(index, workers=4, **options))
    late = list(training(index, start=25, **options))
    split = LaneSplit(8, ranks=4, accumulation=1)
    ranks = [list(training(index, lanes=split.lanes(rank), **options)) for rank in range(4)]
    for name in ("inputs", "targets", "lookback"):
        arrays = [getattr(segment, name) for segment in all_at_once]
        assert np.array_equal(arrays, [getattr(segment, name) for segment in many])
        assert np.array_equal(arrays[25:], [getattr(segment, name) for segment in late])
        assert np.array_equal(arrays, np.concatenate([[getattr(s, name) for s in rank] for rank in ranks], axis=1))


@pytest.mark.parametrize("num_lanes", [1, 3, 7])
def test_evaluation_scores_every_token_once(index, num_lanes):
    split = index.splits["valid"]
    plan = EvaluationPlan(split.document_starts, num_lanes, 16)
    segments = list(Segments(plan, SampleReader(index, "valid"), range(num_lanes), index.eos, 0, plan.steps))
    rows = [np.concatenate([segment.targets[lane] for segment in segments]) for lane in range(num_lanes)]
    scored = np.concatenate([row[row != NOT_SCORED] for row in rows])
    assert np.array_equal(scored, SampleReader(index, "valid").tokens(0, split.tokens))
    assert segments[0].inputs[0, 0] == index.eos


def test_a_damaged_shard_is_named(dataset, tmp_path):
    copy = tmp_path / "damaged"
    shutil.copytree(dataset, copy)
    index = Index.open(str(copy))
    shard = copy / index.splits["train"].shards[0].name
    content = bytearray(shard.read_bytes())
    position = content.index(b"tokens.npy") + 512 + 200  # within the first sample's tokens
    content[position] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"000000\.tar.*sample 0"):
        list(training(index))
