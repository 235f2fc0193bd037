"""Evaluation: every token is scored once, as one long forward scores it, and printed as JSON for scripts."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.batches import batch
from txl_dist.checkpoint.format import directory, latest, open_checkpoint
from txl_dist.data.index import Index
from txl_dist.data.samples import SampleReader
from txl_dist.errors import ConfigError
from txl_dist.runs.load import explain_missing_average, find_data, load_model

LENGTHS = {}


@pytest.fixture(scope="module")
def trained_run(run, small, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("evaluate") / "run"
    run("txl_dist.train", *small, f"run.dir={run_dir}", "train.max_steps=40")
    return run_dir


def evaluated(run, run_dir, *overrides):
    return json.loads(run("txl_dist.evaluate", f"run={run_dir}", "format=json", *overrides).stdout)


def test_json_is_all_there_is_on_standard_output(run, trained_run, metrics, dataset):
    result = evaluated(run, trained_run, "split=test", "num_lanes=8")
    split = json.loads((dataset / "index.json").read_text())["splits"]["test"]
    assert result["split"] == "test" and result["tokens"] == split["tokens"] and result["tokens_per_second"] > 0
    for key in ("loss", "perplexity", "bits_per_byte"):  # as training has logged for the same split and lanes
        assert result[key] == pytest.approx(metrics(trained_run)[-1][f"test/{key}"], rel=1e-6)


def test_a_table_for_people(run, trained_run):
    result = run("txl_dist.evaluate", f"run={trained_run}", "split=valid").stdout
    assert "bits per byte" in result and re.search(r"mem_len +24", result)


def test_segments_with_memory_score_as_one_long_forward(run, trained_run, dataset):
    """One lane and a memory longer than the split: each token sees all before it, for any length of segments."""
    index = Index.open(str(dataset))
    total = index.splits["valid"].tokens
    tokens = torch.from_numpy(SampleReader(index, "valid").tokens(0, total).astype(np.int64))[None]
    inputs = torch.cat([torch.full((1, 1), index.eos), tokens[:, :-1]], dim=1)
    lengths = {"tgt_len": total, "mem_len": 0}
    model, _ = load_model(str(trained_run), None, lengths)
    with torch.no_grad():
        nats, _ = model.double()(
            batch(inputs, tokens, torch.arange(total)[None]),
            model.double().empty_memory(1),
        )
    for tgt_len in (16, 50):
        result = evaluated(
            run, trained_run, "split=valid", "num_lanes=1", f"model.mem_len={total}", f"model.tgt_len={tgt_len}"
        )
        assert result["loss"] == pytest.approx(nats.mean().item(), rel=1e-5)
        assert result["tokens"] == total


def test_every_number_of_lanes_scores_every_token(run, trained_run):
    one, seven = (evaluated(run, trained_run, "split=valid", f"num_lanes={lanes}") for lanes in (1, 7))
    assert one["tokens"] == seven["tokens"]
    assert one["loss"] == pytest.approx(seven["loss"], rel=0.02) and one["loss"] != seven["loss"]


def test_lengths_that_do_not_fit_together_are_refused(run, trained_run):
    done = run("txl_dist.evaluate", f"run={trained_run}", "model.same_length=true", "model.mem_len=0", expect=2)
    assert "model.same_length" in done.stderr and "Traceback" not in done.stderr


def test_other_data_are_refused(run, trained_run, corpus, tmp_path):
    run("txl_dist.prepare", "corpus=text", f"corpus.path={corpus}", f"data.dir={tmp_path / 'other'}", "tokenizer=word")
    done = run("txl_dist.evaluate", f"run={trained_run}", f"data_dir={tmp_path / 'other'}", expect=2)
    assert "data_dir" in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_sizes_are_those_of_the_text(run, trained_run, corpus, dataset):
    """Count the text of the test split by hand."""
    index = Index.open(str(dataset))
    split = index.splits["test"]
    text = index.tokenizer().decode(SampleReader(index, "test").tokens(0, split.tokens).tolist())
    result = evaluated(run, trained_run, "split=test")
    assert result["bytes"] == split.bytes == len(text.encode()) and result["characters"] == len(text)
    assert result["words"] == sum(len(line.split()) + 1 for line in text.splitlines())
    nats = result["loss"] * result["tokens"]
    assert result["word_perplexity"] == pytest.approx(np.exp(nats / result["words"]))
    assert result["bits_per_character"] == pytest.approx(nats / np.log(2) / len(text))


def test_where_words_are_unknown_sizes_are_still_those_of_the_text(run, small, tmp_path):
    """A split of mostly unknown words, with indentation and a last line without end; a part of it has no sizes."""
    lines = [f"    {name}  was here,\t{n} times\r\n" for n in range(60) for name in ("Ann", "Bob")]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "book.txt").write_bytes("".join(lines).encode())
    (tmp_path / "test.txt").write_bytes("".join([*lines, "and so on"]).encode())
    data, run_dir = tmp_path / "data", tmp_path / "run"
    options = ["corpus=text", f"corpus.train={tmp_path}/text", f"corpus.test={tmp_path}/test.txt", f"data.dir={data}"]
    run("txl_dist.prepare", *options, "tokenizer=word", "tokenizer.vocab_size=6", "data.sample_tokens=64", "workers=1")
    run("txl_dist.train", *small, f"data.dir={data}", f"run.dir={run_dir}", "train.max_steps=2", "train.eval_every=2")
    result = evaluated(run, run_dir, "split=test")
    text = "".join([*lines, "and so on"])
    assert (result["bytes"], result["characters"]) == (len(text.encode()), len(text))
    assert result["words"] == len(text.split()) + text.count("\n") == result["tokens"] - 1
    nats = result["loss"] * result["tokens"]
    assert result["bits_per_character"] == pytest.approx(nats / np.log(2) / len(text))
    assert result["word_perplexity"] == pytest.approx(np.exp(nats / result["words"]))
    part = evaluated(run, run_dir, "split=test", "max_tokens=50")
    unknown = ["bytes", "characters", "bits_per_byte", "bits_per_character"]
    assert [part[key] for key in unknown] == [None] * 4
    assert part["words"] == 50 and part["word_perplexity"] == pytest.approx(part["perplexity"])
    table = run("txl_dist.evaluate", f"run={run_dir}", "split=test", "max_tokens=50").stdout
    assert re.search(r"bits per byte +unknown", table) and "None" not in table
    table = run("txl_dist.evaluate", f"run=[{run_dir},{run_dir}/../run]", "split=test", "max_tokens=50").stdout
    assert len(re.findall(r" unknown *$", table, re.MULTILINE)) == 2


def test_several_runs_are_one_table(run, trained_run, tmp_path):
    runs = [str(trained_run), str(trained_run / "../run")]
    results = evaluated(run, f"[{','.join(runs)}]", "split=valid")
    assert [result["run"] for result in results] == runs and results[0]["loss"] == results[1]["loss"]
    table = run("txl_dist.evaluate", f"run={trained_run.parent}/*", "split=valid").stdout
    assert table.count(str(trained_run)) == 1 and "perplexity" in table
    assert "matches no run" in run("txl_dist.evaluate", f"run={tmp_path}/*", expect=2).stderr


def test_a_run_that_cannot_be_evaluated_leaves_the_others_their_rows(run, trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "a")
    shutil.copytree(trained_run, tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    shutil.copytree(trained_run, tmp_path / "c")
    for weights in (tmp_path / "c" / "checkpoints").glob("*/weights-*"):
        weights.unlink()
    runs = f"run=[{','.join(str(tmp_path / name) for name in 'bcda')}]"
    done = run("txl_dist.evaluate", runs, "split=valid", "max_tokens=20", "format=json", expect=2)
    *broken, valid = json.loads(done.stdout)
    assert [Path(result["run"]).name for result in broken] == ["b", "c", "d"]
    reasons = ("holds no checkpoint", "is missing", "there is no such run directory")
    for result, reason in zip(broken, reasons, strict=True):
        assert reason in result["error"]
    assert valid["run"] == f"{tmp_path}/a" and valid["loss"] > 0
    done = run("txl_dist.evaluate", f"run={tmp_path}/[ac]", "split=valid", "max_tokens=20", expect=2)
    assert re.search(r" 40 +16 +24 ", done.stdout) and "is missing" in done.stdout
    assert not [line for line in done.stderr.splitlines() if not line]  # no progress bar where there is no terminal


def test_the_data_are_found_from_any_folder(trained_run, dataset, tmp_path):
    checkpoint = latest(str(trained_run))
    assert checkpoint.data["place"] == str(dataset)
    moved = {"place": f"{tmp_path}/gone"}
    local = replace(checkpoint, config={"data": {"dir": str(tmp_path)}})
    assert find_data("r", local) == str(dataset)
    assert find_data("r", replace(local, data=moved)) == str(tmp_path)
    assert find_data("r", replace(local, data={})) == str(tmp_path)  # a checkpoint of an earlier version
    assert find_data("r", replace(local, data={}, config={"data": {"dir": None}})) is None
    with pytest.raises(ConfigError, match="data_dir: is missing; the data of r are no longer at .*/gone"):
        find_data("r", replace(local, data=moved, config={"data": {"dir": "d/word"}}))


@pytest.fixture(scope="module")
def one_layer(run, small, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("one_layer") / "run"
    run("txl_dist.train", *small, f"run.dir={run_dir}", "model.n_layer=1", "train.max_steps=40")
    return run_dir


def test_sliding_window_and_memory_agree_where_contexts_are_equal(run, one_layer):
    """One layer sees only what its memory holds: a window of 3 tokens, or segments in which each token sees 3."""
    options = ["split=valid", "num_lanes=1", "max_tokens=300"]
    window = evaluated(run, one_layer, *options, "sliding_window=true", "model.tgt_len=3")
    memory = evaluated(run, one_layer, *options, "model.tgt_len=5", "model.mem_len=3", "model.same_length=true")
    assert window["tokens"] == memory["tokens"] == 300
    assert window["loss"] == pytest.approx(memory["loss"], rel=1e-6)
    other = evaluated(run, one_layer, *options, "model.tgt_len=5", "model.mem_len=2", "model.same_length=true")
    assert window["loss"] != pytest.approx(other["loss"], rel=1e-6)


def test_sliding_window_as_long_as_the_text_is_memory_of_all(run, trained_run):
    options = ["split=valid", "max_tokens=60"]
    window = evaluated(run, trained_run, *options, "sliding_window=true", "model.tgt_len=60")
    memory = evaluated(run, trained_run, *options, "num_lanes=1", "model.mem_len=60")
    assert window["loss"] == pytest.approx(memory["loss"], rel=1e-6)


def test_averaged_weights_are_the_mean_of_those_of_the_steps(run, small, tmp_path):
    """Compare with the checkpoints of steps 18 to 20, over which the mean is taken."""
    every = ["checkpoint.every=1", "checkpoint.keep_last=20", "optimizer.average_from=18"]
    run("txl_dist.train", *small, f"run.dir={tmp_path / 'run'}", *every)
    kept = [open_checkpoint(directory(tmp_path / "run", step)).tensors("weights") for step in (18, 19, 20)]
    model, checkpoint = load_model(str(tmp_path / "run"), None, LENGTHS, average=True)
    parameters = dict(model.named_parameters())
    for name, value in checkpoint.tensors("weights").items():
        mean = torch.stack([weights[name] for weights in kept]).mean(0)
        torch.testing.assert_close(parameters[name].detach(), mean, rtol=1e-5, atol=1e-6)
        assert not torch.equal(mean, value)
    plain = evaluated(run, tmp_path / "run", "split=valid")
    averaged = evaluated(run, tmp_path / "run", "split=valid", "average=true")
    assert plain["loss"] != averaged["loss"]


def test_an_average_that_was_not_kept_is_refused(run, trained_run):
    done = run("txl_dist.evaluate", f"run={trained_run}", "average=true", expect=2)
    assert "optimizer.average_from" in done.stderr and "Traceback" not in done.stderr
    checkpoint = latest(str(trained_run))
    assert "only a run that was started with" in explain_missing_average(checkpoint)
    later = {"optimizer": {"average_from": 41}}
    assert "keeps them from step 41 on" in explain_missing_average(replace(checkpoint, config=later))
    assert explain_missing_average(replace(checkpoint, config={"optimizer": {"average_from": 40}})) is None
    assert "imported" in explain_missing_average(replace(checkpoint, state={"imported": {}}))
