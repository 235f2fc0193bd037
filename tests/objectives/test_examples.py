"""What is read of examples, and what is asked of them."""

import numpy as np
import pytest
import torch

from txl_dist.config.schema import ClassificationConfig, SpanQAConfig
from txl_dist.data.examples import ExampleSource, Place
from txl_dist.data.format import ANSWERED, LABELLED, Examples
from txl_dist.data.tokenizers import BytesTokenizer
from txl_dist.objectives.classification import Classification
from txl_dist.objectives.examples import FIRST, MARK, PADDING, SECOND, Marks
from txl_dist.objectives.span_qa import SpanQA, Windows

SEP, CLS = 4, 3


class Pieces:
    """A tokenizer of which only the special pieces are asked."""

    eos = 7
    specials = {"<sep>": SEP, "<cls>": CLS}


def labels(max_tokens=None, pairs=False, kind="labels", tokenizer=Pieces):
    examples = Examples(kind=kind, labels=["a", "b"] if kind == "labels" else [], pairs=pairs)
    return Classification(ClassificationConfig("classification", max_tokens, None), examples, tokenizer())


def questions(stride=None, tgt_len=12, passage_first=True, tokenizer=Pieces):
    config = SpanQAConfig("span_qa", "beam", passage_first, stride, 3, 5)
    return SpanQA(config, tokenizer())


def source(*texts, rows=None, dtype=None):
    """Texts of tokens 10, 11, ... and of 50, 51, ...: pairs of two lengths."""
    pairs = [(np.arange(10, 10 + first), np.arange(50, 50 + second)) for first, second in texts]
    made = ExampleSource.of_texts(pairs)
    table = None if rows is None else np.array([(len(a), *row) for (a, _), row in zip(pairs, rows, strict=True)], dtype)
    return ExampleSource(made.first, made.second, made.tokens, table)


def segments(objective, made, tgt_len, lanes=1):
    return list(objective.one_pass(made, lanes, tgt_len, range(lanes)))


def test_a_text_ends_with_sep_and_cls_behind_padding():
    (read,) = segments(labels(), source((3, 0), rows=[(1,)], dtype=LABELLED), 8)
    assert read.inputs.tolist() == [[SEP, SEP, SEP, 10, 11, 12, SEP, CLS]]
    assert read.kind.tolist() == [[PADDING] * 3 + [FIRST] * 4 + [MARK]]
    assert read.lookback.tolist() == [[0, 0, 0, 0, 1, 2, 3, 4]]
    assert read.targets.tolist() == [[1]] and read.place.tolist() == [[0, 0]]


def test_a_pair_has_a_sep_behind_each_text():
    (read,) = segments(labels(pairs=True), source((2, 3), rows=[(0,)], dtype=LABELLED), 8)
    assert read.inputs.tolist() == [[10, 11, SEP, 50, 51, 52, SEP, CLS]]
    assert read.kind.tolist() == [[FIRST] * 3 + [SECOND] * 4 + [MARK]]


def test_without_special_pieces_eos_begins_and_ends_texts():
    (read,) = segments(labels(pairs=True, tokenizer=BytesTokenizer), source((2, 1), rows=[(0,)], dtype=LABELLED), 6)
    eos = BytesTokenizer().eos
    assert read.inputs.tolist() == [[eos, 10, 11, eos, 50, eos]]
    assert Marks.of(BytesTokenizer()).count(2) == 3


def test_a_long_text_is_read_segment_by_segment_and_asked_at_its_end():
    first, second, third = segments(labels(), source((8, 0), rows=[(1,)], dtype=LABELLED), 4)
    read = np.concatenate([first.inputs, second.inputs, third.inputs], axis=1)
    assert read.tolist() == [[SEP, SEP, *range(10, 18), SEP, CLS]]
    assert np.concatenate([first.lookback, second.lookback, third.lookback], axis=1).tolist() == [[0, 0, *range(10)]]
    assert [one.targets.tolist() for one in (first, second, third)] == [[[-100]], [[-100]], [[1]]]
    assert [one.place.tolist() for one in (first, second, third)] == [[[-1, -1]], [[-1, -1]], [[0, 2]]]


def test_a_lane_that_waits_reads_padding():
    read = segments(labels(), source((8, 0), (1, 0), rows=[(1,), (0,)], dtype=LABELLED), 4, lanes=2)
    waiting = read[-1]
    assert waiting.kind[1].tolist() == [PADDING] * 4 and waiting.targets[1].tolist() == [-100]


@pytest.mark.parametrize("first, second", [(9, 2), (2, 9), (9, 9), (5, 6), (1, 1), (6, 1)])
def test_pairs_are_cut_as_the_authors_cut_them(first, second):
    """Token by token from the longer text, from the second of two equal ones (`_truncate_seq_pair`)."""
    a, b = first, second
    while a + b > 10 - 3:
        if a > b:
            a -= 1
        else:
            b -= 1
    made = source((first, second), rows=[(0,)], dtype=LABELLED)
    (read,) = segments(labels(max_tokens=10, pairs=True), made, 10)
    tokens = read.inputs[0][read.kind[0] != PADDING].tolist()
    assert tokens == [*range(10, 10 + a), SEP, *range(50, 50 + b), SEP, CLS]


def test_scores_are_numbers_and_unknown_ones_are_not():
    objective = labels(kind="scores")
    (first, second) = segments(objective, source((5, 0), rows=[(-100.0,)], dtype=LABELLED), 4)
    batches = [objective.batch(one) for one in (first, second)]
    assert [objective.is_scored(batch["targets"]).tolist() for batch in batches] == [[[False]], [[True]]]
    assert batches[1]["targets"].dtype == torch.float32 and batches[1]["targets"].item() == -100.0


@pytest.mark.parametrize("passage, room, stride", [(5, 8, 3), (8, 8, 3), (9, 8, 3), (30, 8, 3), (30, 8, 8), (31, 7, 1)])
def test_windows_cover_the_passage_and_all_but_the_first_are_full(passage, room, stride):
    windows = Windows(passage, room, stride)
    spans = [windows.span(number) for number in range(windows.number)]
    assert spans[0][0] == 0 and spans[-1][1] == passage
    assert all(end - begin == room for begin, end in spans[1:]) and 0 < spans[0][1] <= room
    assert all(after[1] - before[1] == stride for before, after in zip(spans, spans[1:], strict=False))
    assert all(after[0] <= before[1] for before, after in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize("passage_first", [True, False])
@pytest.mark.parametrize("tokenizer", [Pieces, BytesTokenizer])
def test_every_window_has_the_question_and_says_where_the_answer_is(passage_first, tokenizer):
    made = source((20, 5), rows=[(9, 11)], dtype=ANSWERED)  # the question is cut to 3 tokens
    objective = questions(4, passage_first=passage_first, tokenizer=tokenizer)
    asked = 0
    for number, read in enumerate(segments(objective, made, 14)):
        begin, end = objective.windows_of(made, 0, 14).span(number)
        tokens = read.inputs[0]
        start, stop, *allowed = read.targets[0].tolist()
        assert tokens[np.flatnonzero(allowed)[:-1]].tolist() == list(range(10 + begin, 10 + end))
        assert allowed[-1] == 1 and read.place.tolist() == [[0, number]]
        assert [token for token in tokens.tolist() if 50 <= token < 60] == [50, 51, 52]
        if begin <= 9 and end > 11:
            assert (tokens[start], tokens[stop]) == (19, 21)
            asked += 1
        else:
            assert start == stop == 13
    assert asked


def test_no_answer_is_the_last_position():
    (read,) = segments(questions(), source((4, 2), rows=[(-1, -1)], dtype=ANSWERED), 12)
    assert read.targets[0, :2].tolist() == [11, 11]


def test_what_is_said_belongs_to_the_examples_that_end():
    objective = labels()
    made = source((8, 0), (1, 0), rows=[(1,), (0,)], dtype=LABELLED)
    said = []
    for number, read in enumerate(segments(objective, made, 4, lanes=2)):
        result = torch.arange(2 * 3, dtype=torch.float32).view(2, 3) + 100 * number  # loss, and two outputs
        said += objective.predictions(result, objective.batch(read))
    assert [prediction.place for prediction in said] == [Place(1, 0), Place(0, 2)]
    assert [prediction.outputs.tolist() for prediction in said] == [[4.0, 5.0], [201.0, 202.0]]
