"""Numbers as tokens: documents begin with <eos>, and stay in step with segments where it does not stand in the data."""

import json

import numpy as np
import pytest

from txl_dist.config.schema import DatasetConfig, DuplicationCorpusConfig, IdsTokenizerConfig, PrepareJob
from txl_dist.data import tokenizers
from txl_dist.data.index import Index
from txl_dist.data.lanes import BEGINNING, LanePlan, LaneSplit, Origin
from txl_dist.data.mu_law import from_mu_law, mu_law
from txl_dist.data.samples import SampleReader
from txl_dist.data.segments import NOT_SCORED, Segments, whole_split
from txl_dist.data.text_size import TextSize, number_of_dimensions, size_of_text
from txl_dist.data.tokenizers import IdsTokenizer, Picture, Sound
from txl_dist.errors import UserError
from txl_dist.evaluation.encode import encode_text
from txl_dist.prepare import prepare

LENGTH, LANES = 16, 4


def duplication(folder, end, seed=1):
    """Documents of LENGTH numbers, a multiple of LANES of them; samples hold no whole number of documents."""
    config = DuplicationCorpusConfig("duplication", LENGTH, 24, 6, 0, seed)
    cut = DatasetConfig(str(folder), sample_tokens=100, shard_samples=2)
    prepare(PrepareJob(config, IdsTokenizerConfig("ids", None, end), cut, 1))
    return Index.open(str(folder))


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    return duplication(tmp_path_factory.mktemp("ids") / "aligned", end=None)


def training(index, lanes=range(LANES), start=0, workers=1, **options):
    plan = LanePlan(index.splits["train"].document_starts, LANES, LENGTH, seed=3, **options)
    return Segments(plan, SampleReader(index, "train"), lanes, index.eos, start, 20, workers)


@pytest.mark.parametrize("order", ["corpus", "documents"])
@pytest.mark.parametrize("reset", ["never", "document"])
def test_each_segment_is_a_document(aligned, order, reset):
    documents = SampleReader(aligned, "train").tokens(0, 24 * LENGTH).reshape(24, LENGTH).tolist()
    read = []
    for segment in training(aligned, order=order, reset_memory=reset):
        for lane in range(LANES):
            target = segment.targets[lane].tolist()
            assert segment.inputs[lane].tolist() == [aligned.eos, *target[:-1]]
            history = 0 if reset == "document" else segment.step * LENGTH
            assert segment.lookback[lane].tolist() == list(range(history, history + LENGTH))
            read.append(target)
    first_epoch = read[:24]
    assert sorted(first_epoch) == sorted(documents)


@pytest.mark.parametrize("order", ["corpus", "documents"])
@pytest.mark.parametrize("num_lanes", [5, 7, 24])
def test_lanes_begin_with_documents_whatever_their_number(aligned, order, num_lanes):
    """24 documents; a part has one more or less, and every document is read once in an epoch."""
    starts = aligned.splits["train"].document_starts
    for origin in (BEGINNING, Origin(step=0, tokens=LENGTH * 9 + 5)):
        unit = aligned.aligned_length("train")
        plan = LanePlan(starts, num_lanes, LENGTH, order=order, origin=origin, unit=unit)
        assert unit == LENGTH
        read = [plan.spans(lane, step) for lane in range(num_lanes) for step in range(len(plan.part(lane)) // LENGTH)]
        assert all(len(spans) == 1 and spans[0].position % LENGTH == 0 for spans in read)
        if origin is BEGINNING:
            assert sorted(spans[0].position for spans in read) == starts[:-1].tolist()


@pytest.mark.parametrize("num_lanes", [1, 4, 5, 8])
@pytest.mark.parametrize("tokens", [None, 50])
def test_evaluation_cuts_no_document(aligned, num_lanes, tokens):
    """6 documents, or the first 50 numbers of them, also on more lanes than there are documents."""
    segments = list(whole_split(aligned, "valid", num_lanes, LENGTH, "document", range(num_lanes), tokens=tokens))
    rows = [(s.inputs[lane], s.targets[lane]) for s in segments for lane in range(num_lanes)]
    rows = [(inputs, targets) for inputs, targets in rows if targets[0] != NOT_SCORED]
    assert all(targets[0] == 0 and inputs[0] == aligned.eos for inputs, targets in rows)
    assert sum((targets != NOT_SCORED).sum() for _, targets in rows) == (tokens or 6 * LENGTH)


def test_other_datasets_have_the_lanes_that_they_had(tmp_path, aligned, dataset):
    assert Index.open(str(dataset)).aligned_length("train") == 1
    assert duplication(tmp_path / "end", end=True).aligned_length("train") == 1
    few = LanePlan(aligned.splits["valid"].document_starts, 10, LENGTH, unit=LENGTH)  # 6 documents
    assert [few.part(lane).start for lane in range(10)] == [lane * 96 // 10 for lane in range(10)]


@pytest.mark.parametrize("reset", ["never", "document"])
def test_lanes_and_starts_find_the_same_inputs(aligned, reset):
    """Segments that are not in step with the documents: <eos> stands within them."""
    starts = aligned.splits["train"].document_starts
    plan = LanePlan(starts, LANES, 13, reset_memory=reset)
    everything = list(Segments(plan, SampleReader(aligned, "train"), range(LANES), aligned.eos, 0, 30))
    for rank in range(2):
        lanes = LaneSplit(LANES, 2, 1).lanes(rank)
        late = list(Segments(plan, SampleReader(aligned, "train"), lanes, aligned.eos, 11, 30, workers=3))
        for one, two in zip(everything[11:], late, strict=True):
            assert np.array_equal(one.inputs[lanes], two.inputs) and np.array_equal(one.targets[lanes], two.targets)
    for segment in everything:
        begins = segment.targets == 0
        begins &= (segment.step * 13 + np.arange(13)) % LENGTH == 0  # each lane starts with a document
        assert np.array_equal(segment.inputs == aligned.eos, begins)


@pytest.mark.parametrize("num_lanes, tgt_len", [(1, 13), (3, 16), (5, 7)])
def test_evaluation_reads_the_same_inputs(aligned, num_lanes, tgt_len):
    stream = SampleReader(aligned, "valid").tokens(0, 6 * LENGTH).astype(np.int64)
    segments = list(whole_split(aligned, "valid", num_lanes, tgt_len, "never", range(num_lanes)))
    before = np.concatenate([[aligned.eos], stream[:-1]])
    before[::LENGTH] = aligned.eos
    inputs, targets = (
        np.concatenate(
            [np.concatenate([getattr(segment, name)[lane] for segment in segments]) for lane in range(num_lanes)]
        )
        for name in ("inputs", "targets")
    )
    assert np.array_equal(targets[targets != NOT_SCORED], stream)
    assert np.array_equal(inputs[targets != NOT_SCORED], before)


def test_with_end_the_stream_itself_has_the_eos(tmp_path, aligned):
    index = duplication(tmp_path / "data", end=True)
    split = index.splits["train"]
    stream = SampleReader(index, "train").tokens(0, split.tokens).reshape(24, LENGTH + 1)
    assert (stream[:, -1] == index.eos).all() and index.fingerprint != aligned.fingerprint
    for segment in training(index):
        assert (segment.inputs[:, 1:] == segment.targets[:, :-1]).all()


def test_dimensions_are_numbers_without_eos(tmp_path, aligned, dataset):
    with_end = duplication(tmp_path / "data", end=True)
    assert number_of_dimensions(aligned, "train", 24 * LENGTH) == 24 * LENGTH
    assert number_of_dimensions(aligned, "train", 50) == 50
    assert number_of_dimensions(with_end, "train", 24 * (LENGTH + 1)) == 24 * LENGTH
    assert [number_of_dimensions(with_end, "train", tokens) for tokens in (16, 17, 18, 34)] == [16, 16, 17, 32]
    for index in (aligned, with_end):
        for tokens in (50, index.splits["train"].tokens):
            assert size_of_text(index, "train", tokens) == TextSize(None, None, None)
    text = Index.open(str(dataset))
    assert number_of_dimensions(text, "train", text.splits["train"].tokens) is None


def test_numbers_are_encoded_and_decoded():
    tokenizer = IdsTokenizer(300, end=True)
    assert tokenizer.encode(b" 1 2\n299\t0 ", end=True).tolist() == [1, 2, 299, 0, 300]
    assert tokenizer.encode(b"", end=False).tolist() == []
    assert IdsTokenizer(300, end=False).encode(b"7", end=True).tolist() == [7]
    assert tokenizer.decode([1, 2, 300, 299]) == "1 2 299"
    assert tokenizer.word_starts().tolist() == [True] * 301


@pytest.mark.parametrize("text", ["1 x", "1 300", "-1", "1 1.5", "\u0663", b"1 \xff", "9" * 30])
def test_what_is_no_number_of_the_vocabulary_is_named(text):
    with pytest.raises(UserError, match=r"prompt: number \d, .*, is not one of 0 to 299; give numbers with spaces"):
        encode_text(IdsTokenizer(300, end=True), text, "prompt")


@pytest.mark.parametrize("content", [None, Picture(3, 4, 1), Sound(16000)])
def test_a_saved_tokenizer_is_the_same(tmp_path, content):
    tokenizer = IdsTokenizer(256, False, content)
    tokenizer.save(tmp_path)
    loaded = tokenizers.load(tmp_path)
    assert isinstance(loaded, IdsTokenizer) and loaded.content == content
    assert (loaded.vocab_size, loaded.eos, loaded.ends_documents) == (257, 256, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": "257"},
        {"vocab_size": 0},
        {"eos": 5},
        {"end": 1},
        {"picture": {"height": 3, "width": 4, "channels": 2}},
        {"picture": {"height": -3, "width": 4, "channels": 1}},
        {"picture": {"height": 3}},
        {"picture": [3, 4, 1]},
        {"sound": {"rate": 0}},
        {"sound": {"rate": 1e9}},
    ],
)
def test_a_damaged_tokenizer_is_refused(tmp_path, changes):
    IdsTokenizer(256, False).save(tmp_path)
    facts = json.loads((tmp_path / "tokenizer.json").read_text()) | changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=str(tmp_path)):
        tokenizers.load(tmp_path)


def test_mu_law_has_256_levels_that_come_back():
    assert mu_law(from_mu_law(np.arange(256))).tolist() == list(range(256))
    assert mu_law(np.array([-1.0, 0.0, 1.0])).tolist() == [0, 128, 255]
    # ITU-T G.711, continuous form: ln(1 + 255 x) / ln 256.
    assert mu_law(np.array([0.1]))[0] == round((1 + np.log(1 + 25.5) / np.log(256)) / 2 * 255)
