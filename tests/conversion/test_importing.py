"""Imported checkpoints of Hugging Face, the authors and NVIDIA have the same numbers here."""

import pickle
import re
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.batches import batch
from tests.conversion.third_party import (
    CASES,
    LANES,
    SHARED_CASES,
    VOCAB,
    WORDS,
    assert_same,
    authors_module,
    authors_state,
    hugging_face_model,
    import_run,
    load_run,
    load_weights,
    nvidia_config,
    nvidia_state,
    pickled_class,
    pickled_vocabulary,
    refusal,
    save_folder,
    tokens,
)
from txl_dist.data import tokenizers

TIED = {"div_val 2", "all projections tied", "as the paper's large model"}  # by our one switch; else they are copies


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_losses_with_memory_are_hugging_faces(case, safe, tmp_path):
    """Theirs begins with mem_len zeros that every token sees: to ours, as if as many tokens had been read."""
    reference = hugging_face_model(**CASES[case])
    model = load_run(import_run(save_folder(reference, tmp_path / "hf", safe), tmp_path / "run"))
    mems, memory = None, model.empty_memory(LANES)
    for step in range(5):
        inputs, targets = tokens(LANES, 5, seed=step), tokens(LANES, 5, seed=50 + step)
        read = model.config.mem_len + 5 * step
        nll, memory = model(batch(inputs, targets, torch.arange(read, read + 5).expand(LANES, 5)), memory)
        output = reference(inputs, mems=mems)
        mems = output.mems
        expected = -output.prediction_scores.gather(-1, targets[..., None]).squeeze(-1)
        torch.testing.assert_close(nll, expected, rtol=0, atol=1e-5)
    assert model.config.tie_weights == reference.config.tie_word_embeddings
    assert model.config.tie_projections == (case in TIED)


@pytest.mark.parametrize("file", ["vocab.txt", "vocab.pkl", "vocab.bin"])
def test_a_folder_states_its_lengths_and_words(file, tmp_path):
    folder = save_folder(hugging_face_model(mem_len=9, same_length=True), tmp_path / "hf")
    if file != "vocab.txt":
        (folder / "vocab.txt").unlink()
        vocab = {"idx2sym": WORDS, "lower_case": False, "delimiter": None, "pattern": re.compile("x"), "set": {1}}
        torch.save(vocab, folder / file) if file == "vocab.bin" else (folder / file).write_bytes(pickle.dumps(vocab))
    run_dir = import_run(folder, tmp_path / "run")
    config = load_run(run_dir).config
    assert (config.mem_len, config.same_length, config.clamp_len, config.dropout) == (9, True, -1, 0.1)
    assert tokenizers.load(run_dir / "tokenizer").words == WORDS
    given = {"mem_len": 3, "tgt_len": 4, "clamp_len": 2}
    config = load_run(import_run(tmp_path / "hf", tmp_path / "other", model=given)).config
    assert (config.mem_len, config.tgt_len, config.clamp_len) == (3, 4, 2)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("case", CASES)
def test_the_authors_module(case, new, tmp_path, monkeypatch):
    model = hugging_face_model(**SHARED_CASES[case])
    module = authors_module(monkeypatch, model)
    torch.save(module, tmp_path / "model.pt", _use_new_zipfile_serialization=new)
    corpus = pickled_class(monkeypatch, "data_utils", "Corpus")()
    corpus.vocab, corpus.train = pickled_vocabulary(monkeypatch), torch.arange(5)
    torch.save(corpus, tmp_path / "cache.pt", _use_new_zipfile_serialization=new)
    for name in ("mem_transformer", "vocabulary", "data_utils"):
        monkeypatch.delitem(sys.modules, name)  # their code is not needed to read it
    run_dir = import_run(tmp_path / "model.pt", tmp_path / "run")
    other = import_run(save_folder(model, tmp_path / "hf"), tmp_path / "other")
    assert_same(load_weights(run_dir), load_weights(other))
    assert load_run(run_dir).config == replace(load_run(other).config, tgt_len=5, dropout=0.25, dropatt=0.125)
    assert tokenizers.load(run_dir / "tokenizer").words == WORDS


@pytest.mark.parametrize("case", ["full softmax", "clusters", "div_val 2, nothing tied"])
def test_the_authors_state_dict_needs_lengths(case, tmp_path):
    model, words = hugging_face_model(**SHARED_CASES[case]), tmp_path / "vocab.txt"
    torch.save(authors_state(model), tmp_path / "model.pt")
    message = refusal(tmp_path / "model.pt", tmp_path / "run")
    keys = ["tgt_len", "mem_len", "clamp_len", "same_length", "pre_lnorm"] + ["cutoffs"] * (case == "clusters")
    assert all(f"model.{key}: is missing" in message for key in keys) and "tokenizer_from: is missing" in message
    assert len(message.splitlines()) == len(keys) + 1
    save_folder(model, tmp_path / "hf")
    words.write_text((tmp_path / "hf" / "vocab.txt").read_text())
    lengths = dict(tgt_len=5, mem_len=7, clamp_len=-1, same_length=False, pre_lnorm=False)
    given = lengths | {"cutoffs": model.config.cutoffs}
    run_dir = import_run(tmp_path / "model.pt", tmp_path / "run", tokenizer_from=words, model=given)
    assert_same(load_weights(run_dir), load_weights(import_run(tmp_path / "hf", tmp_path / "other")))


@pytest.mark.parametrize("case", CASES)
def test_nvidias_checkpoint(case, tmp_path, monkeypatch):
    model = hugging_face_model(**SHARED_CASES[case])
    vocab = pickled_vocabulary(monkeypatch)
    state = {"model_config": nvidia_config(model), "model_state": nvidia_state(model), "vocab": vocab, "epoch": 1}
    torch.save(state | {"optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}}}, tmp_path / "checkpoint_best.pt")
    monkeypatch.delitem(sys.modules, "vocabulary")
    run_dir = import_run(tmp_path / "checkpoint_best.pt", tmp_path / "run")
    other = import_run(save_folder(model, tmp_path / "hf"), tmp_path / "other")
    assert_same(load_weights(run_dir), load_weights(other))
    config = load_run(run_dir).config
    # A token of theirs sees mem_len others and itself.
    assert config == replace(load_run(other).config, tgt_len=5, mem_len=7 + config.same_length)


def test_clusters_counted_from_the_end(tmp_path):
    """The authors' formula, from the tensors as they are in the file: tail i is column -i of the head."""
    state = authors_state(hugging_face_model(**SHARED_CASES["div_val 2"]))
    torch.save(state, tmp_path / "model.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    lengths = dict(tgt_len=5, mem_len=7, clamp_len=-1, same_length=False, pre_lnorm=False)
    run_dir = import_run(tmp_path / "model.pt", tmp_path / "run", tokenizer_from=tmp_path / "vocab.txt", model=lengths)
    hidden = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    parts = []
    for i in range(3):
        narrow = hidden @ state[f"crit.out_projs.{i}"]
        parts.append((narrow, state[f"crit.out_layers.{i}.weight"], state[f"crit.out_layers.{i}.bias"]))
    narrow, table, bias = parts[0]
    head = narrow @ torch.cat([table, state["crit.cluster_weight"]]).T
    head = (head + torch.cat([bias, state["crit.cluster_bias"]])).log_softmax(-1)
    tails = [(narrow @ table.T + bias).log_softmax(-1) for narrow, table, bias in parts[1:]]
    expected = torch.cat([head[:, :10], *(head[:, [-i]] + tail for i, tail in enumerate(tails, 1))], dim=-1)
    log_probs = load_run(run_dir).softmax(hidden[None], None)[0]
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)


def test_shared_u_and_v_become_each_layers(tmp_path):
    model = hugging_face_model(n_layer=3, untie_r=False)
    weights = load_weights(import_run(save_folder(model, tmp_path / "hf"), tmp_path / "run"))
    for layer in range(3):
        assert torch.equal(weights[f"layers.{layer}.attention.u"], model.transformer.r_w_bias)
        assert torch.equal(weights[f"layers.{layer}.attention.v"], model.transformer.r_r_bias)


def test_all_problems_of_a_checkpoint_are_reported_at_once(tmp_path):
    folder = save_folder(hugging_face_model(cutoffs=[10, 20], div_val=2), tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.layers.1.dec_attn.r_net.weight"]
    tensors["crit.cluster_bias"] = torch.zeros(3)
    tensors["crit.new"] = torch.zeros(4, 5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in [*WORDS, "more"]))
    lines = refusal(folder, tmp_path / "run").splitlines()
    assert len(lines) == 4 and not (tmp_path / "run").exists()
    assert lines[0].startswith(f"from={folder}") and "51 tokens" in lines[0] and "50" in lines[0]
    assert any(line.startswith("transformer.layers.1.dec_attn.r_net.weight: is missing") for line in lines)
    assert any(line.startswith("crit.cluster_bias: has the shape [3]") and "[2]" in line for line in lines)
    assert any(line.startswith("crit.new") and "[4, 5]" in line for line in lines)


@pytest.mark.parametrize("changes, message", [({"lower_case": True}, "lower_case"), ({"delimiter": ""}, "delimiter")])
def test_words_that_were_not_made_by_white_space_are_refused(changes, message, tmp_path, monkeypatch):
    model = hugging_face_model(untie_r=False)
    state = {"model_config": nvidia_config(model), "model_state": nvidia_state(model)}
    torch.save(state | {"vocab": pickled_vocabulary(monkeypatch, **changes)}, tmp_path / "model.pt")
    assert message in refusal(tmp_path / "model.pt", tmp_path / "run")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    words = tmp_path / "vocab.txt"  # given words replace the pickled ones
    import_run(tmp_path / "model.pt", tmp_path / "run", tokenizer_from=words)


def test_a_vocabulary_without_eos_is_refused(tmp_path):
    folder = save_folder(hugging_face_model(), tmp_path / "hf")
    (folder / "vocab.txt").write_text("".join(f"w{i}\n" for i in range(VOCAB)))
    message = refusal(folder, tmp_path / "run")
    assert "<eos>" in message and "<unk>" in message
