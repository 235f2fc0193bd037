"""Segments of permuted order: pure in (seed, lane, step), contiguous in both directions, each with its targets."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.data.datasets import write
from txl_dist.config.schema import PermutationLMConfig
from txl_dist.data.index import Index
from txl_dist.data.lanes import BEGINNING, Origin
from txl_dist.data.two_way import TwoWayPlan
from txl_dist.objectives.base import Score
from txl_dist.objectives.permutation_lm import Drawing, PermutationLM, PermutedSegments

SEP, CLS, VOCAB = 3, 4, 200
LANES = 6
LENGTH, REUSED = 48, 24
ARRAYS = ("inputs", "targets", "lookback", "rank", "segment", "direction", "positions")

rng = np.random.default_rng(0)
TEXT = rng.integers(5, VOCAB, 5000).astype("<u2")  # without special pieces
SENTENCES = np.concatenate([[0], np.cumsum(rng.integers(2, 15, 600))])
SENTENCES = SENTENCES[len(TEXT) > SENTENCES].astype(np.uint64)


class Pieces:
    """A vocabulary in which two of three pieces begin a word."""

    specials = {"<sep>": SEP, "<cls>": CLS}

    def word_starts(self):
        return np.arange(VOCAB) % 3 > 0


class Reader:
    fill_value = None

    def tokens(self, start, length):
        assert 0 <= start <= start + length <= len(TEXT)
        return TEXT[start : start + length]


def config(**options):
    values = {"num_predict": 10, "perm_size": 12, "spans": "words", "pairs": True, "directions": "both"}
    return PermutationLMConfig(name="permutation_lm", **{**values, **options})


def loader(lanes=range(LANES), start=0, stop=40, seed=1, workers=1, origin=BEGINNING, **options):
    chosen = config(**options)
    plan = TwoWayPlan(np.array([0, len(TEXT)], np.uint64), LANES, REUSED, chosen.directions == "both", origin)
    drawing = Drawing(chosen, PermutationLM(chosen, Pieces()).pieces, LENGTH, REUSED, seed)
    return PermutedSegments(plan, Reader(), lanes, drawing, SENTENCES, start, stop, workers)


def same(one, other, rows=slice(None)):
    return all(np.array_equal(getattr(one, name)[rows], getattr(other, name)) for name in ARRAYS)


@pytest.mark.parametrize("options", [{}, {"spans": "tokens"}, {"pairs": False}, {"directions": "forward"}])
def test_every_lane_has_exactly_its_targets(options):
    for seed in range(3):
        for segment in loader(seed=seed, stop=60, **options):
            assert segment.positions.shape == segment.targets.shape == (LANES, 10)
            assert (np.diff(segment.positions) > 0).all()
            assert ((segment.positions < REUSED).sum(axis=1) == 5).all()
            assert np.array_equal(np.take_along_axis(segment.inputs, segment.positions, axis=1), segment.targets)
            assert not np.isin(segment.targets, (SEP, CLS)).any()
            # A target has a rank of its own; each part has context, whose rank is lower.
            for rank, positions in zip(segment.rank, segment.positions, strict=True):
                for half, context in ((slice(0, REUSED), 0), (slice(REUSED, None), REUSED + 1)):
                    own = rank[positions[(positions >= half.start) & (positions < (half.stop or LENGTH))]]
                    assert len(set(own.tolist())) == 5 and (own > context).all()
                    assert (rank[half] == context).sum() == 24 - 5 - 3 * (context > 0) * options.get("pairs", True)


def test_the_share_of_the_reused_part_is_that_of_its_length():
    chosen = config(num_predict=85)
    assert chosen.first_targets(512, 256) in (42, 43)
    assert chosen.first_targets(512, 128) == 21 and chosen.first_targets(512, 384) == 64


@pytest.mark.parametrize("options", [{}, {"pairs": False, "spans": "tokens"}])
def test_a_row_is_the_same_whoever_reads_it_and_when(options):
    everything = list(loader(**options))
    for lanes in ([3], [5, 0], [4, 2, 1]):
        for segment in loader(lanes=lanes, start=17, stop=21, workers=3, **options):
            assert same(everything[segment.step], segment, lanes)
    backwards = loader(**options)
    for step in (39, 7, 20):
        assert same(everything[step], backwards.read(step))
    assert not same(everything[5], loader(seed=2, **options).read(5))
    assert loader(lanes=[], **options).read(0).inputs.shape == (0, LENGTH)  # of a middle stage


@pytest.mark.parametrize("pairs", [True, False])
def test_what_is_read_ahead_is_reused_in_both_directions(pairs):
    """So the memory of a lane is of what came right before, whichever way it reads."""
    segments = list(loader(stop=80, pairs=pairs))
    backward = np.concatenate([TEXT[::-1], TEXT[::-1]])
    forward = np.concatenate([TEXT, TEXT])
    for lane in range(LANES):
        part = lane % 3 * len(TEXT) // 3
        begin = part if lane < 3 else len(TEXT) - (lane % 3 + 1) * len(TEXT) // 3
        read = forward if lane < 3 else backward
        for before, segment in zip(segments, segments[1:], strict=False):
            ahead = before.inputs[lane, REUSED:]
            if pairs:
                ahead = ahead[: int(np.argmax(ahead == SEP))]
            common = min(len(ahead), REUSED)
            assert common > 0 and np.array_equal(segment.inputs[lane, :common], ahead[:common])
            expected = read[begin + segment.step * REUSED :][:REUSED]
            assert np.array_equal(segment.inputs[lane, :REUSED], expected)
        assert [segment.direction[lane, 0] for segment in segments] == [1 if lane < 3 else -1] * 80


def test_a_position_may_look_back_on_all_that_its_lane_has_read():
    late = loader(origin=Origin(step=30, tokens=30 * LANES * REUSED))
    for step, segment in ((0, loader().read(0)), (3, loader().read(3)), (0, late.read(30)), (2, late.read(32))):
        assert np.array_equal(segment.lookback, np.tile(step * REUSED + np.arange(LENGTH), (LANES, 1)))
    assert np.array_equal(late.read(30).inputs[:, :REUSED], loader().read(30).inputs[:, :REUSED])


def test_two_stretches_are_marked_and_separated():
    for segment in loader(stop=60):
        for tokens, marks in zip(segment.inputs, segment.segment, strict=True):
            first = int(np.argmax(tokens == SEP))
            assert tokens[-2:].tolist() == [SEP, CLS] and (tokens == SEP).sum() == 2 and (tokens == CLS).sum() == 1
            assert REUSED < first < LENGTH - 3
            expected = [0] * (first + 1) + [1] * (LENGTH - first - 2) + [2]
            assert marks.tolist() == expected


def test_special_pieces_are_in_the_order_but_are_no_context():
    for segment in loader(stop=60):
        is_special = np.isin(segment.inputs, (SEP, CLS))
        assert (segment.rank[is_special] > REUSED + 1).all()


def test_one_stretch_has_no_special_pieces():
    for segment in loader(stop=60, pairs=False):
        assert not np.isin(segment.inputs, (SEP, CLS)).any() and not segment.segment.any()


def test_words_are_whole_in_the_order_of_the_text_for_backward_lanes_too():
    begins_word = Pieces().word_starts()
    cut = {"words": [0, 0], "tokens": [0, 0]}
    for kind, counts in cut.items():
        for segment in loader(stop=100, spans=kind, pairs=False):
            for tokens, positions, direction in zip(
                segment.inputs, segment.positions, segment.direction[:, 0], strict=True
            ):
                chosen = np.zeros(LENGTH, bool)
                chosen[positions] = True
                for half in (slice(0, REUSED), slice(REUSED, LENGTH)):
                    in_text = chosen[half][::direction]
                    begins = np.flatnonzero(in_text & ~np.append(False, in_text[:-1]))
                    counts[int(direction < 0)] += int((~begins_word[tokens[half][::direction][begins]]).sum())
    assert cut["words"] == [0, 0] and min(cut["tokens"]) > 20


def test_the_order_differs_from_lane_to_lane_and_from_step_to_step():
    segments = loader(pairs=False, directions="forward")
    segments.texts[1].reader = SimpleNamespace(tokens=lambda start, length: np.full(length, 7))  # everywhere the same
    ranks = {tuple(rank.tolist()) for step in range(10) for rank in segments.read(step).rank}
    assert len(ranks) == 10 * LANES


def test_the_second_stretch_follows_or_is_of_the_part_of_the_lane():
    segments = loader(stop=60)
    follows = []
    for segment in segments:
        for lane in range(LANES):
            text = TEXT[:: segments.plan.direction(lane)].astype(np.int64)
            text = np.concatenate([text, text])
            first = int(np.argmax(segment.inputs[lane] == SEP))
            a, b = segment.inputs[lane, REUSED:first], segment.inputs[lane, first + 1 : -2]
            if len(b) < 4:
                continue
            windows = np.lib.stride_tricks.sliding_window_view(text, len(b))
            begin = int(np.argmax((windows == b).all(axis=1)))
            assert np.array_equal(text[begin : begin + len(b)], b)
            a_end = (segments.plan.reading_position(lane, segment.step) + REUSED + len(a)) % len(TEXT)
            part = segments.plan.reading_part(lane)
            follows.append(0 <= (begin - a_end) % len(TEXT) < 15)
            assert follows[-1] or begin in range(part.start % len(TEXT), part.start % len(TEXT) + len(part) + LENGTH)
    assert 0.3 < np.mean(follows) < 0.7


# ---------------------------------------------------------------------------------------- as an objective of a run


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A dataset with sentences; its tokens are bytes, and its tokenizer knows nothing of words."""
    rng = np.random.default_rng(3)
    documents = [rng.integers(5, VOCAB, length).astype("<u2") for length in (600, 40, 900)]
    folder = write(tmp_path_factory.mktemp("sentences"), {"train": documents, "valid": documents[:2]})
    index = Index.open(str(folder))
    for split in index.splits.values():
        object.__setattr__(split, "sentence_starts", np.arange(0, split.tokens, 9, dtype=np.uint64))
    return index


def job_of(**evaluation):
    model = SimpleNamespace(tgt_len=LENGTH, reuse_len=REUSED)
    return SimpleNamespace(
        run=SimpleNamespace(seed=7),
        data=SimpleNamespace(num_lanes=LANES, workers=2),
        model=model,
        evaluated_model=SimpleNamespace(**{**vars(model), **evaluation}),
    )


def test_training_starts_anywhere_and_evaluation_is_the_same_every_time(index):
    objective = PermutationLM(config(), Pieces())
    segments = list(objective.segments(job_of(), index, range(LANES), BEGINNING, 0, 12))
    late = list(objective.segments(job_of(), index, range(2, 4), BEGINNING, 9, 12))
    assert all(same(segments[9 + number], segment, slice(2, 4)) for number, segment in enumerate(late))

    evaluated = [list(objective.evaluation_segments(job_of(), index, "valid", range(LANES))) for _ in range(2)]
    assert len(evaluated[0]) == -(-214 // REUSED)  # a third of the split
    assert all(same(one, other) for one, other in zip(*evaluated, strict=True))
    other_seed = job_of()
    other_seed.run.seed = 8
    again = list(objective.evaluation_segments(other_seed, index, "valid", range(LANES)))
    assert all(same(one, other) for one, other in zip(evaluated[0], again, strict=True))


def test_evaluation_reads_with_its_own_lengths(index):
    objective = PermutationLM(config(pairs=False), Pieces())
    job = job_of(tgt_len=60, reuse_len=36)
    segment = next(iter(objective.evaluation_segments(job, index, "valid", range(LANES))))
    assert segment.inputs.shape == (LANES, 60) and ((segment.positions < 36).sum(axis=1) == 6).all()


def test_a_batch_is_what_the_model_takes(index):
    objective = PermutationLM(config(), Pieces())
    segment = objective.segments(job_of(), index, range(LANES), BEGINNING, 0, 1).read(0)
    batch = objective.batch(segment)
    shapes = {name: tuple(field.shape) for name, field in batch.items()}
    assert shapes == {
        **dict.fromkeys(("inputs", "lookback", "rank", "segment"), (LANES, LENGTH)),
        **dict.fromkeys(("positions", "targets"), (LANES, 10)),
        "direction": (LANES, 1),
    }
    assert {field.dtype for field in batch.values()} == {torch.int64}


def test_it_is_scored_per_predicted_token():
    objective = PermutationLM(config(), Pieces())
    assert objective.num_targets(LENGTH) == 10
    nats = torch.arange(12.0).view(2, 6)
    loss, by_lane = objective.loss(nats, 1.0)
    assert loss.item() == 5.5 and by_lane.tolist() == [2.5, 8.5]
    assert objective.metrics(Score(20.0, 10), None, "valid") == {"loss": 2.0, "perplexity": pytest.approx(np.exp(2.0))}


def test_without_pairs_no_special_pieces_are_needed():
    class Plain(Pieces):
        specials = {}

    PermutationLM(config(pairs=False), Plain())
    with pytest.raises(KeyError):
        PermutationLM(replace(config(), pairs=True), Plain())
