"""A thousand ranks, simulated: what every rank computes for itself fits together, with no rank asking another."""

from collections import Counter

import numpy as np
import pytest
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

from txl_dist.data.lanes import LanePlan, LaneSplit

LANES, TGT_LEN, LAYERS = 4096, 384, 24
SHARDS, SHARD_TOKENS = 100_000, 1000
BEFORE = LaneSplit(LANES, ranks=1024, accumulation=8, stages=8)  # data parallel 128
AFTER = LaneSplit(LANES, ranks=512, accumulation=8, stages=4)  # the same lanes a rank, twice the layers
RESTART, END = 100, 3 * SHARDS * SHARD_TOKENS // (LANES * TGT_LEN) + 1  # the last step ends after three epochs


def layers(split, rank):
    share = LAYERS // split.stages
    return range(split.stage(rank) * share, (split.stage(rank) + 1) * share)


def owners(split):
    """Of each memory (layer, lane) the ranks that keep it."""
    return Counter((l, n) for rank in range(split.ranks) for l in layers(split, rank) for n in split.lanes(rank))


def plan_of(order):
    """The plan as each rank makes it, anew: documents of all sizes, 100,000 shards of them."""
    sizes = np.random.default_rng(1).integers(100, 20_000, SHARDS * SHARD_TOKENS // 10_000)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    starts = np.append(starts[starts < SHARDS * SHARD_TOKENS], SHARDS * SHARD_TOKENS)
    return LanePlan(starts, LANES, TGT_LEN, seed=1, order=order)


@pytest.mark.parametrize("split", [BEFORE, AFTER], ids=["1024 ranks", "512 ranks"])
def test_every_lane_has_one_rank_in_each_stage(split):
    topology = PipeDataParallelTopology(num_pp=split.stages, num_dp=split.data_parallel)
    for rank in range(split.ranks):
        coordinates = topology.get_coord(rank)
        pipeline = [topology.get_rank(pipe=stage, data=coordinates.data) for stage in range(split.stages)]
        assert split.stage(rank) == coordinates.pipe
        assert {split.lanes(peer) for peer in pipeline} == {split.lanes(rank)}  # a pipeline's ranks have the same lanes
    kept = owners(split)
    assert len(kept) == LAYERS * LANES and set(kept.values()) == {1}


def test_three_epochs_and_a_restart_with_half_the_ranks():
    """Followed along every lane: at each step it reads on where the step before has ended."""
    reads = np.zeros((END, LANES, 3), np.int64)  # position, length, history
    for split, steps in ((BEFORE, range(RESTART)), (AFTER, range(RESTART, END))):
        plan = plan_of("corpus")
        for rank in range(split.data_parallel):  # of one stage; the other stages' lanes are the same
            for lane in split.lanes(rank):
                for step in steps:
                    (span, *rest) = plan.spans(lane, step)
                    reads[step, lane] = span.position, sum(part.length for part in [span, *rest]), span.history
    position, length, history = np.moveaxis(reads, -1, 0)
    tokens = SHARDS * SHARD_TOKENS
    assert (length == TGT_LEN).all()
    assert (position[0] == np.arange(LANES) * tokens // LANES).all()
    assert ((position[1:] - position[:-1]) % tokens == TGT_LEN).all()
    assert (history == np.arange(END)[:, None] * TGT_LEN).all()
    # Every shard is read in each epoch: a lane reads its neighbour's part after its own.
    for epoch in range(3):
        first, last = (int(part * tokens / LANES / TGT_LEN) for part in (epoch, epoch + 1))
        begin = position[first : last + 1]
        touched = np.unique((begin[..., None] + [0, TGT_LEN - 1]) % tokens // SHARD_TOKENS)
        assert len(touched) == SHARDS


@pytest.mark.slow
def test_shuffled_documents_are_read_once_in_the_third_epoch():
    plan = plan_of("documents")
    change = np.zeros(SHARDS * SHARD_TOKENS + 1, np.int32)
    for lane in range(LANES):
        begin, end = 2 * len(plan.part(lane)), 3 * len(plan.part(lane))
        read = begin // TGT_LEN * TGT_LEN
        for step in range(begin // TGT_LEN, -(-end // TGT_LEN)):
            for span in plan.spans(lane, step):
                cut = max(0, begin - read), min(span.length, end - read)
                if cut[0] < cut[1]:
                    change[span.position + cut[0]] += 1
                    change[span.position + cut[1]] -= 1
                read += span.length
    assert (change.cumsum()[:-1] == 1).all()
