"""The lane plan: every token once, contiguous streams, nothing that depends on ranks."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from txl_dist.data.lanes import EvaluationPlan, LanePlan, LaneSplit, Origin

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def starts_of(document_lengths):
    return np.concatenate([[0], np.cumsum(document_lengths)]).astype(np.int64)


def positions(plan, lane, step):
    spans = plan.spans(lane, step)
    return np.concatenate([np.arange(s.position, s.position + s.length) for s in spans] or [np.zeros(0, np.int64)])


def stream(plan, lane, count):
    """The first `count` positions that a lane reads."""
    steps = -(-count // plan.tgt_len)
    return np.concatenate([positions(plan, lane, step) for step in range(steps)])[:count]


@st.composite
def plans(draw, order):
    document_lengths = draw(lengths)
    total = sum(document_lengths)
    num_lanes = draw(st.integers(1, min(total, 7)))
    reset = draw(st.sampled_from(["never", "document"]))
    return LanePlan(
        starts_of(document_lengths), num_lanes, draw(st.integers(1, 9)), draw(st.integers(0, 3)), order, reset
    )


@given(plans("corpus"))
def test_corpus_order_reads_every_token_once_an_epoch(plan):
    seen = np.concatenate([stream(plan, lane, len(plan.part(lane))) for lane in range(plan.num_lanes)])
    assert np.array_equal(seen, np.arange(plan.tokens))  # in order, too: lane l's part follows lane l - 1's


@given(plans("corpus"))
def test_corpus_order_is_contiguous_over_epochs(plan):
    for lane in range(plan.num_lanes):
        read = stream(plan, lane, 3 * plan.tokens)
        assert read[0] == plan.part(lane).start
        assert np.array_equal(read[1:], (read[:-1] + 1) % plan.tokens)


@given(plans("documents"))
def test_document_order_reads_every_token_once_in_each_epoch(plan):
    for epoch in range(3):
        seen = []
        for lane in range(plan.num_lanes):
            size = len(plan.part(lane))
            seen.append(stream(plan, lane, (epoch + 1) * size)[epoch * size :])
        assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(plan.tokens))


@given(plans("documents"))
def test_document_order_keeps_documents_whole_but_for_lane_borders(plan):
    breaks = 0
    for lane in range(plan.num_lanes):
        read = stream(plan, lane, len(plan.part(lane)))
        jumps = np.flatnonzero(np.diff(read) != 1)
        # A jump leaves at a document's end, and lands at a document's start.
        assert np.isin(read[jumps] + 1, plan.starts).all()
        assert np.isin(read[jumps + 1], plan.starts[:-1]).all()
        breaks += not np.isin(read[0], plan.starts)
    assert breaks <= plan.num_lanes - 1


def test_document_order_differs_by_epoch_and_seed():
    starts = starts_of([5] * 40)
    read = {
        (seed, epoch): stream(LanePlan(starts, 1, 10, seed, "documents"), 0, 400)[
            epoch * 200 : (epoch + 1) * 200
        ].tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(positions) for positions in read.values()}) == 4


@given(plans("corpus") | plans("documents"))
@example(LanePlan(starts_of([1, 2]), 3, 1, 0, "documents", "document"))
def test_history_counts_what_the_lane_may_remember(plan):
    for lane in range(plan.num_lanes):
        read, history, previous = 0, 0, None
        for step in range(12):
            spans = plan.spans(lane, step)
            assert sum(span.length for span in spans) == plan.tgt_len
            for span in spans:
                # A lane's part of an epoch begins anew, even where it happens to lie behind its part of the one before.
                new_part = plan.order == "documents" and read % len(plan.part(lane)) == 0
                begins = new_part or span.position in plan.starts
                if plan.reset_memory == "document" and (begins or previous is None or span.position != previous + 1):
                    history = 0
                assert span.history == (history if plan.reset_memory == "document" else read)
                if plan.reset_memory == "document":
                    inside = plan.starts[(plan.starts > span.position) & (plan.starts < span.position + span.length)]
                    assert len(inside) == 0  # a span never runs over a document's start
                read, history, previous = read + span.length, history + span.length, span.position + span.length - 1


@given(plans("corpus") | plans("documents"), st.randoms())
def test_a_step_is_found_without_the_steps_before_it(plan, random):
    asked = [(random.randrange(plan.num_lanes), random.randrange(40)) for _ in range(10)]
    fresh = LanePlan(plan.starts, plan.num_lanes, plan.tgt_len, plan.seed, plan.order, plan.reset_memory)
    in_order = {key: plan.spans(*key) for key in sorted(asked)}
    assert all(fresh.spans(*key) == in_order[key] for key in asked)


@given(lengths, st.integers(1, 7), st.integers(1, 9), st.sampled_from(["never", "document"]))
def test_evaluation_scores_every_token_once(document_lengths, num_lanes, tgt_len, reset):
    starts = starts_of(document_lengths)
    num_lanes = min(num_lanes, int(starts[-1]))
    plan = EvaluationPlan(starts, num_lanes, tgt_len, reset)
    seen = [positions(plan, lane, step) for lane in range(num_lanes) for step in range(plan.steps)]
    assert np.array_equal(np.concatenate(seen), np.arange(starts[-1]))
    assert all(not plan.spans(lane, plan.steps) for lane in range(num_lanes))


@given(plans("corpus") | plans("documents"), st.integers(0, 30))
def test_lanes_that_begin_anew_read_on_without_a_history(plan, step):
    """As many lanes as before: what they read is the same, and they remember what they have read since."""
    tokens = step * plan.num_lanes * plan.tgt_len
    anew = LanePlan(
        plan.starts, plan.num_lanes, plan.tgt_len, plan.seed, plan.order, plan.reset_memory, Origin(step, tokens)
    )
    for lane in range(plan.num_lanes):
        for later in range(step, step + 4):
            read = (later - step) * plan.tgt_len
            for now, before in zip(anew.spans(lane, later), plan.spans(lane, later), strict=True):
                assert now[:2] == before[:2] and now.history == min(read, before.history)
                read += now.length


@given(plans("corpus"), st.integers(1, 7), st.integers(1, 9), st.integers(0, 30))
def test_other_lanes_go_on_at_the_same_share_of_the_epoch(plan, num_lanes, tgt_len, step):
    num_lanes = min(num_lanes, plan.tokens)
    tokens = step * plan.num_lanes * plan.tgt_len
    other = LanePlan(plan.starts, num_lanes, tgt_len, origin=Origin(step, tokens))
    for lane in range(num_lanes):
        begin = other.part(lane).start
        read = (other.spans(lane, step)[0].position - begin) % plan.tokens
        assert read * num_lanes <= tokens % (plan.tokens * num_lanes) < (read + 1) * num_lanes
        assert other.spans(lane, step)[0].history == 0


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_every_lane_has_one_place_under_every_split(stages, data_parallel, accumulation, micro_batch):
    split = LaneSplit(data_parallel * accumulation * micro_batch, stages * data_parallel, accumulation, stages)
    assert (split.micro_batch, split.data_parallel) == (micro_batch, data_parallel)
    for stage in range(stages):
        ranks = [rank for rank in range(split.ranks) if split.stage(rank) == stage]
        assert [lane for rank in ranks for lane in split.lanes(rank)] == list(range(split.num_lanes))


@pytest.mark.parametrize("order", ["corpus", "documents"])
def test_any_step_of_ten_billion_tokens_is_found(order):
    """Without scanning: a plan that looked at every step before the millionth would not end."""
    documents = 5_000_000
    starts = np.arange(documents + 1, dtype=np.int64) * 2_000
    plan = LanePlan(starts, 4096, 384, 1, order, "document")
    for step in (0, 1_000_000):
        for lane in range(0, 4096, 8):
            assert sum(span.length for span in plan.spans(lane, step)) == 384
