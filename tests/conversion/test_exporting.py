"""Exported folders give the same numbers, texts and tokens in transformers 5 as here."""

import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.batches import batch
from tests.conversion.third_party import (
    CASES,
    LANES,
    VOCAB,
    WORDS,
    assert_same,
    convert_job,
    hugging_face_model,
    import_run,
    load_run,
    refusal,
    save_folder,
)
from tests.conversion.xlnet_models import TOKENIZER as XLNET_TOKENIZER
from txl_dist.checkpoint.format import latest
from txl_dist.convert import convert
from txl_dist.data import tokenizers
from txl_dist.evaluation.sampling import Sampler, continuations

LINES = [f"    the {kind} of a {noun}, {n}" for n in range(40) for kind in ("one", "sum") for noun in ("sea", "house")]
TOKENIZERS = {
    "bytes": tokenizers.BytesTokenizer(),
    "word": tokenizers.WordTokenizer(WORDS),
    "sentencepiece": tokenizers.SentencePieceTokenizer.train(LINES, 288, "unigram"),
}
TEXTS = [
    "w1 w2  zz\n\n w3 <eos> <unk> w4\n",
    "\u2581 a\u2581\u2581b  \t<eos> </s> <unk> <0x41> \r\n日本語 é e\u0301 \U0001f600 x",
    "",
    "\n",
]
TEXTS += ["the sum of a house, 7\n    the one"]
EXPORTS = [*CASES, "bytes", "sentencepiece"]
LONG = 43  # tokens: more than memory and segment together


@pytest.fixture(scope="session")
def runs(run, small, tmp_path_factory):
    """Run directories to be exported: of every case, and one trained here, with each tokenizer."""
    parent = tmp_path_factory.mktemp("runs")
    for name in CASES:
        folder = save_folder(hugging_face_model(**CASES[name]), parent / "hf" / name)
        import_run(folder, parent / name, model={"tgt_len": 5})
    run("txl_dist.train", *small, f"run.dir={parent / 'bytes'}")
    size = TOKENIZERS["sentencepiece"].vocab_size
    folder = save_folder(hugging_face_model(vocab_size=size), parent / "hf" / "sentencepiece")
    (folder / "vocab.txt").write_text("\n".join([*WORDS, *(f"more{i}" for i in range(size - VOCAB))]))
    import_run(folder, parent / "sentencepiece", model={"tgt_len": 5})
    shutil.rmtree(parent / "sentencepiece" / "tokenizer")
    TOKENIZERS["sentencepiece"].save(parent / "sentencepiece" / "tokenizer")
    return {name: parent / name for name in EXPORTS}


@pytest.fixture(scope="session")
def exported(runs, transformers5, tmp_path_factory):
    """The folder of each run that holds its export, and the tensors and facts that transformers 5 computes of it."""
    parent = tmp_path_factory.mktemp("exported")
    cases = {name: parent / name.replace(" ", "_").replace(",", "") for name in runs}
    for name, run_dir in runs.items():
        case = cases[name]
        case.mkdir()
        convert(convert_job(run=run_dir, to=case / "folder"))
        size = latest(run_dir).data["vocab_size"]
        stream = torch.randint(size, (LANES, LONG), generator=torch.Generator().manual_seed(3))
        save_file({"stream": stream}, case / "input.safetensors")
        (case / "texts.json").write_text(json.dumps(TEXTS))
    environment = os.environ | transformers5 | {"HF_HOME": str(parent.with_name("hugging_face"))}
    command = [sys.executable, Path(__file__).with_name("exported.py"), *cases.values()]
    done = subprocess.run(command, cwd=parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return cases


@pytest.fixture(params=EXPORTS)
def case(request, runs, exported):
    """A run's directory, the folder with its export, and the tensors and facts of transformers 5."""
    folder = exported[request.param]
    tensors = load_file(folder / "output.safetensors")
    facts = json.loads((folder / "output.json").read_text())
    return runs[request.param], folder, tensors, facts


@torch.no_grad()
def log_probs(model, stream):
    """Our model's log-probabilities of a stream, read in segments from an empty memory."""
    memory, start, out = model.empty_memory(len(stream)), 0, []
    for segment in stream.split(model.config.tgt_len, dim=1):
        lookback = torch.arange(start, start + segment.size(1)).expand_as(segment)
        of_segment, memory = model(batch(segment, None, lookback), memory)
        out.append(of_segment)
        start += segment.size(1)
    return torch.cat(out, dim=1)


@pytest.mark.slow
def test_transformers_5_computes_our_numbers(case):
    run_dir, folder, computed, _ = case
    stream = load_file(folder / "input.safetensors")["stream"]
    expected = log_probs(load_run(run_dir), stream)
    assert latest(run_dir).config["model"]["mem_len"] + latest(run_dir).config["model"]["tgt_len"] < LONG
    assert (computed["logits"] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (computed["pieces"] - computed["logits"]).abs().max() <= 1e-5 * expected.abs().max()
    loss = -expected[:, :-1].gather(-1, stream[:, 1:, None]).mean()
    torch.testing.assert_close(computed["loss"], loss, rtol=0, atol=1e-5)


def test_transformers_5_generates_our_text(case):
    """Greedily, token by token with memory; alone, beside a longer prompt, and without a cache."""
    run_dir, folder, computed, facts = case
    stream = load_file(folder / "input.safetensors")["stream"]
    model = load_run(run_dir)
    length = model.config.tgt_len
    for key, prompts in (("greedy", stream[:1, :length]), ("short", stream[1:, : length - 2])):
        expected = list(islice(continuations(model, prompts.tolist(), Sampler(temperature=0.0)), 20))
        assert computed[key].tolist() == torch.cat([prompts, torch.tensor(expected).T], dim=1).tolist()
    assert computed["together"][0].tolist() == computed["greedy"][0].tolist()
    assert computed["together"][1:, 2:].tolist() == computed["short"].tolist()
    assert computed["beams"].shape == computed["greedy"].shape
    # One more token costs one row in every linear layer, and the memory stays as long as it is.
    assert set(facts["work"]["rows"]) == {1} and facts["work"]["kept"] == model.config.mem_len


def test_the_tokenizer_is_ours(case):
    run_dir, _, _, facts = case
    tokenizer = tokenizers.load(run_dir / "tokenizer")
    assert facts["vocabulary"] == [tokenizer.vocab_size] * 2
    for text, ids, decoded in zip(TEXTS, facts["ids"], facts["decoded"], strict=True):
        expected = tokenizer.encode(text.encode(), False).tolist()
        assert ids == [tokenizer.eos, *expected]
        assert decoded == tokenizer.decode(expected)


def test_weights_come_back_to_the_bit(case, tmp_path):
    """The export, and what transformers 5 has saved of it, imported again."""
    run_dir, folder, _, facts = case
    before = latest(run_dir)
    for name in ("folder", "again"):
        after = latest(import_run(folder / name, tmp_path / name))
        assert_same(after.tensors("weights"), before.tensors("weights"))
        assert after.config["model"] == before.config["model"]
        assert after.data["vocab_size"] == before.data["vocab_size"]
        for path in (run_dir / "tokenizer").iterdir():
            assert (tmp_path / name / "tokenizer" / path.name).read_bytes() == path.read_bytes()
    assert facts["parameters"] == {key: list(value.shape) for key, value in before.tensors("weights").items()}


def test_the_folder_imports_nothing_of_txl_dist(exported):
    for path in (exported["bytes"] / "folder").glob("*.py"):
        assert "import txl_dist" not in path.read_text() and "from txl_dist" not in path.read_text()


def test_lengths_can_be_given_at_the_export(runs, tmp_path):
    convert(convert_job(run=runs["bytes"], to=tmp_path / "out", model={"mem_len": 64, "same_length": True}))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mem_len"], config["same_length"], config["tgt_len"]) == (64, True, 16)


def test_other_attention_is_not_exported(run, small, tmp_path):
    run("txl_dist.train", *small, f"run.dir={tmp_path / 'run'}", "model.attention=shaw", "train.stop_at=1")
    message = refusal(None, tmp_path / "run", to=tmp_path / "out")
    assert "model.attention=shaw" in message and not (tmp_path / "out").exists()


def test_tokenizers_without_code_are_neither_exported_nor_imported(runs, tmp_path):
    shutil.copytree(runs["full softmax"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    XLNET_TOKENIZER.save(tmp_path / "run" / "tokenizer")
    message = refusal(None, tmp_path / "run", to=tmp_path / "out")
    assert "tokenizer.name=xlnet" in message and not (tmp_path / "out").exists()
    convert(convert_job(run=runs["full softmax"], to=tmp_path / "out"))
    (tmp_path / "out" / "tokenizer_config.json").write_text('{"tokenizer_class": "OtherTokenizer"}')
    assert "tokenizer_class='OtherTokenizer': is none" in refusal(tmp_path / "out", tmp_path / "again")


def test_a_damaged_checkpoint_is_not_exported(runs, tmp_path):
    shutil.copytree(runs["full softmax"], tmp_path / "run")
    path = next(latest(tmp_path / "run").path.glob("weights-*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert path.name in refusal(None, tmp_path / "run", to=tmp_path / "out") and not (tmp_path / "out").exists()
