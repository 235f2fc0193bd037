"""Damaged samples move no lane, and the tokens after such a gap are read as the beginning of a document."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.batches import batch
from txl_dist.data.index import Index
from txl_dist.data.lanes import LanePlan
from txl_dist.data.samples import SampleReader
from txl_dist.data.segments import NOT_SCORED, Segments, whole_split
from txl_dist.errors import UserError
from txl_dist.models.transformer_xl import TransformerXL
from txl_dist.objectives.causal_lm import CausalLM

LANES, TGT_LEN, MEM_LEN, SAMPLE = 8, 16, 40, 256
ORDERS = [
    {"order": order, "reset_memory": reset} for order in ("corpus", "documents") for reset in ("never", "document")
]


@pytest.fixture(scope="module")
def stream(dataset):
    index = Index.open(str(dataset))
    return SampleReader(index, "train").tokens(0, index.splits["train"].tokens).astype(np.int64)


def segments(folder, lanes=range(LANES), start=0, stop=60, fill_value=NOT_SCORED, workers=1, **options):
    index = Index.open(str(folder))
    plan = LanePlan(index.splits["train"].document_starts, LANES, TGT_LEN, seed=3, **options)
    reader = SampleReader(index, "train", fill_value=fill_value)
    return Segments(plan, reader, lanes, index.eos, start, stop, workers, MEM_LEN)


@pytest.fixture(scope="module")
def harmed(dataset, damage, tmp_path_factory):
    """A copy with damaged samples, and their numbers: the first, the last, two neighbours, some in the lanes' ways."""
    folder = tmp_path_factory.mktemp("gaps") / "harmed"
    shutil.copytree(dataset, folder)
    split = Index.open(str(folder)).splits["train"]
    part = split.tokens // LANES // SAMPLE
    samples = {0, split.samples - 1, 2 * part + 1, 3 * part + 1, 3 * part + 2, 5 * part + 1}
    damage(folder, *samples)
    return folder, samples


def positions(plan, lane, steps):
    """Return the positions in the stream that a lane reads, and how many tokens of its past it may remember at each."""
    spans = [span for step in steps for span in plan.spans(lane, step)]
    read = [np.arange(span.position, span.position + span.length) for span in spans]
    return np.concatenate(read), np.concatenate([np.arange(s.history, s.history + s.length) for s in spans])


@pytest.mark.parametrize("options", ORDERS, ids=lambda options: "-".join(options.values()))
def test_gaps_are_not_scored_and_never_looked_at(harmed, stream, options):
    """Followed by hand along each lane, one token after the other."""
    folder, samples = harmed
    read = segments(folder, **options)
    steps = range(60)
    all_segments = list(read)
    seen = 0
    for lane in range(LANES):
        position, history = positions(read.plan, lane, steps)
        lost = np.isin(position // SAMPLE, list(samples))
        seen += lost.sum()
        targets, inputs, lookback = (
            np.concatenate([getattr(segment, name)[lane] for segment in all_segments])
            for name in ("targets", "inputs", "lookback")
        )
        assert np.array_equal(targets, np.where(lost, NOT_SCORED, stream[position]))
        before_lost = (position > 0) & np.isin((position - 1) // SAMPLE, list(samples))
        assert np.array_equal(inputs, np.where(before_lost | (position == 0), read.eos, stream[position - 1]))
        since = 1 << 40
        for at in range(len(position)):
            since = -1 if lost[at] else since + 1
            visible = MEM_LEN + at % TGT_LEN  # more is not there to be seen
            assert min(lookback[at], visible) == min(history[at], max(since, 0), visible), (lane, at)
    assert seen > 300 and set(read.reader.damaged) <= samples


@pytest.mark.parametrize("options", ORDERS, ids=lambda options: "-".join(options.values()))
def test_other_lanes_and_intact_data_are_untouched(harmed, dataset, options):
    folder, samples = harmed
    plain = list(segments(dataset, fill_value=None, **options))
    intact = list(segments(dataset, **options))
    some = segments(folder, **options)
    for name in ("inputs", "targets", "lookback"):
        for one, two in zip(intact, plain, strict=True):
            assert np.array_equal(getattr(one, name), getattr(two, name))
    gaps = list(some)
    touched = {
        lane
        for lane in range(LANES)
        for position in [positions(some.plan, lane, range(60))[0]]
        if np.isin(position // SAMPLE, list(samples)).any() or np.isin((position - 1) // SAMPLE, list(samples)).any()
    }
    assert 0 < len(touched) < LANES
    for lane in set(range(LANES)) - touched:
        for one, two in zip(plain, gaps, strict=True):
            for name in ("inputs", "targets", "lookback"):
                assert np.array_equal(getattr(one, name)[lane], getattr(two, name)[lane])


@given(start=st.integers(0, 59), lanes=st.sampled_from([range(8), range(2, 4), range(5, 6)]), number=st.integers(0, 3))
def test_every_start_and_split_finds_the_same_gaps(harmed, start, lanes, number):
    """Gaps beyond the memory may be known or not: nothing there is visible."""
    folder, _ = harmed
    options = ORDERS[number]
    intact = list(segments(folder, workers=2, **options))[start:]
    late = list(segments(folder, lanes, start, **options))
    visible = MEM_LEN + np.arange(TGT_LEN)
    for one, two in zip(intact, late, strict=True):
        assert np.array_equal(one.inputs[lanes], two.inputs) and np.array_equal(one.targets[lanes], two.targets)
        assert np.array_equal(np.minimum(one.lookback[lanes], visible), np.minimum(two.lookback, visible))


@pytest.mark.parametrize("attention", ["relative", "shaw"])
def test_after_a_gap_a_model_reads_on_as_at_a_beginning(harmed, stream, make_config, attention):
    """To rounding: the losses of a model that has never read what was before, and nothing in the gap reaches them."""
    folder, samples = harmed
    read = segments(folder)
    part = Index.open(str(folder)).splits["train"].tokens // LANES // SAMPLE
    lane = 2
    position, _ = positions(read.plan, lane, range(60))
    lost = np.isin(position // SAMPLE, list(samples))
    end = int(np.flatnonzero(lost)[-1]) + 1
    assert lost.any() and not lost[0] and end < 59 * TGT_LEN and position[end] == (2 * part + 2) * SAMPLE
    torch.manual_seed(1)
    config = make_config(attention=attention, tgt_len=TGT_LEN, mem_len=60 * TGT_LEN)
    model = TransformerXL(config, 257).double().eval()
    read.mem_len = config.mem_len
    memory = model.empty_memory(1)
    losses = []
    poisoned = [torch.full_like(state["memory"], 1e6) for state in memory]
    with torch.no_grad():
        for step in range(60):
            segment = read.read(step)
            one_lane = {name: field[lane : lane + 1] for name, field in CausalLM().batch(segment).items()}
            nats, memory = model(one_lane, memory)
            losses.append(nats[0])
            if (step + 1) * TGT_LEN <= end:  # whatever is remembered of the time before
                for state, poison in zip(memory, poisoned, strict=True):
                    state["memory"] = torch.where(state["memory"] != 0, poison, state["memory"])
        behind = torch.cat(losses)[end:]
        tokens = torch.from_numpy(stream[position[end:]])[None]
        inputs = torch.cat([torch.tensor([[read.eos]]), tokens[:, :-1]], dim=1)
        alone, _ = model(batch(inputs, tokens, torch.arange(tokens.size(1))[None]), model.empty_memory(1))
    assert torch.allclose(behind, alone[0], rtol=1e-9, atol=1e-9)


def test_a_damaged_sample_is_read_once_and_stays_damaged(harmed, dataset, tmp_path):
    folder, samples = harmed
    index = Index.open(str(folder))
    reader = SampleReader(index, "train", cache_samples=1, fill_value=NOT_SCORED)
    sample = min(samples - {0})
    assert reader.sample(sample).tolist() == [NOT_SCORED] * SAMPLE
    assert f": sample {sample}: the tokens are not those that were written" in reader.damaged[sample]
    mixed = reader.tokens(sample * SAMPLE - 3, 5)
    assert mixed[-2:].tolist() == [NOT_SCORED] * 2 and (mixed[:3] >= 0).all()
    assert SampleReader(index, "train").tokens(sample * SAMPLE - 3, 3).tolist() == mixed[:3].tolist()
    with pytest.raises(UserError, match=f"sample {sample}: "):
        SampleReader(index, "train").sample(sample)


def test_only_the_samples_beyond_the_cut_of_a_shard_are_lost(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "copy")
    index = Index.open(str(tmp_path / "copy"))
    shard = tmp_path / "copy" / index.splits["train"].shards[1].name  # samples 16 to 31
    end = int(index.splits["train"].sample_table["offset"][20])
    shard.write_bytes(shard.read_bytes()[:end])
    reader = SampleReader(index, "train", fill_value=NOT_SCORED)
    assert [bool((reader.sample(number) < 0).all()) for number in range(14, 34)] == [False] * 6 + [True] * 12 + [
        False
    ] * 2
    with pytest.raises(UserError, match="sample 17: the shard has"):
        SampleReader(index, "train").sample(17)


def test_a_missing_shard_is_not_a_damaged_sample(dataset, tmp_path):
    """It may be a disk that is not there: then all would be skipped."""
    shutil.copytree(dataset, tmp_path / "copy")
    index = Index.open(str(tmp_path / "copy"))
    (tmp_path / "copy" / index.splits["train"].shards[1].name).unlink()
    reader = SampleReader(index, "train", fill_value=NOT_SCORED)
    with pytest.raises(UserError, match="sample 16: No such file"):
        reader.sample(16)


def test_evaluation_never_skips(dataset, damage, tmp_path):
    shutil.copytree(dataset, tmp_path / "copy")
    damage(tmp_path / "copy", 2, split="valid")
    index = Index.open(str(tmp_path / "copy"))
    with pytest.raises(UserError, match="valid/000000.tar: sample 2: the tokens"):
        list(whole_split(index, "valid", 4, 16, "never", range(4)))
