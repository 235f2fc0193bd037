"""Imported XLNet checkpoints have the same numbers here; nearly right ones are read, others refused with a reason."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import XLNetForQuestionAnswering, XLNetForSequenceClassification, XLNetLMHeadModel, XLNetModel

import txl_dist
from tests.batches import batch
from tests.conversion.third_party import assert_same, load_weights
from tests.conversion.xlnet_models import (
    LENGTHS,
    SHARED,
    SMALL,
    TOKENIZER,
    VOCAB,
    authors_tensors,
    convert_job,
    edit_config,
    hugging_face_model,
    import_run,
    refusal,
    save_checkpoint,
    save_folder,
)
from txl_dist.checkpoint.format import latest
from txl_dist.conversion.importing import model_config
from txl_dist.conversion.sources import open_import_source
from txl_dist.convert import convert
from txl_dist.data import tokenizers
from txl_dist.models import registry
from txl_dist.runs.load import load_model

TITLE = {
    XLNetLMHeadModel: "Hugging Face's xlnet",
    XLNetModel: "Hugging Face's xlnet, without lm_loss: the softmax has biases of 0",
    XLNetForSequenceClassification: "Hugging Face's xlnet, without its logits_proj, sequence_summary, without lm_loss",
    XLNetForQuestionAnswering: "Hugging Face's xlnet, without its answer_class, end_logits, start_logits, without",
}


@torch.no_grad()
def causal_log_probs(model, tokens):
    """Hugging Face's log-probabilities of the token after each, where each sees those before it and itself.

    A query stands for each token but the first, and for one after the last.
    """
    length = tokens.size(1) + 1
    padded = torch.cat([tokens, torch.zeros_like(tokens[:, :1])], dim=1)
    hidden = torch.ones(length, length).triu().expand(len(tokens), -1, -1)
    queries = torch.eye(length)[1:].expand(len(tokens), -1, -1)
    return model(padded, perm_mask=hidden, target_mapping=queries).logits.log_softmax(-1)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@torch.no_grad()
def test_a_folder_has_the_same_numbers(safe, activation, tmp_path):
    reference = hugging_face_model(ff_activation=activation)
    folder = save_folder(reference, tmp_path / "hf", safe)
    model, checkpoint = load_model(str(import_run(folder, tmp_path / "run")))
    tokens = torch.randint(VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
    log_probs, _ = model(batch(tokens, None, torch.arange(6).expand(2, 6)), model.empty_memory(2))
    torch.testing.assert_close(log_probs, causal_log_probs(reference, tokens), rtol=1e-5, atol=1e-5)
    assert checkpoint.state["imported"]["title"] == "Hugging Face's xlnet"
    config = checkpoint.config["model"]
    expected = {"gelu": "gelu_erf", "gelu_new": "gelu_tanh", "relu": "relu"}[activation]
    assert (config["activation"], config["mem_len"], config["dropout"], config["d_head"]) == (expected, 7, 0.25, 4)
    assert tokenizers.load(tmp_path / "run" / "tokenizer").model == TOKENIZER.model


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", TITLE)
def test_other_models_give_their_xlnet(kind, safe, tmp_path):
    """A run can begin with it; imported as a run a fine-tuned model keeps its head (test_xlnet_fine_tuned.py)."""
    model = hugging_face_model(kind)
    source = open_import_source(save_folder(model, tmp_path / "hf", safe))
    job = convert_job(**{"from": tmp_path / "hf"}, run=tmp_path / "run", model=LENGTHS)
    assert source.title.startswith(TITLE[kind])
    whole = hugging_face_model()
    whole.transformer.load_state_dict(getattr(model, "transformer", model).state_dict())
    if kind is XLNetLMHeadModel:
        whole.load_state_dict(model.state_dict())
    else:
        torch.nn.init.zeros_(whole.lm_loss.bias)
    run_dir = import_run(save_folder(whole, tmp_path / "lm"), tmp_path / "other")
    assert_same(source.weights(model_config(job, source)), load_weights(run_dir))


@pytest.mark.parametrize("wrap", ["model", "module."])
def test_a_wrapped_or_parted_state_is_read(wrap, tmp_path):
    model = hugging_face_model()
    folder = save_folder(model, tmp_path / "hf", safe=False)
    expected = load_weights(import_run(folder, tmp_path / "run"))
    state = model.state_dict()
    wrapped = {wrap + name: value for name, value in state.items()} if wrap.endswith(".") else {wrap: state}
    torch.save(wrapped, folder / "pytorch_model.bin")
    assert_same(load_weights(import_run(folder, tmp_path / "again")), expected)
    model.save_pretrained(tmp_path / "parts", max_shard_size="4KB")
    (tmp_path / "parts" / "spiece.model").write_bytes(TOKENIZER.model)
    assert_same(load_weights(import_run(tmp_path / "parts", tmp_path / "third")), expected)


def test_lengths_that_a_folder_does_not_state_are_those_of_the_recipe(tmp_path):
    folder = save_folder(hugging_face_model(mem_len=None), tmp_path / "hf")
    convert(convert_job(**{"from": folder}, run=tmp_path / "run"))
    config = latest(tmp_path / "run").config["model"]
    assert (config["tgt_len"], config["mem_len"], config["reuse_len"], config["clamp_len"]) == (512, 384, 256, -1)
    given = {"tgt_len": 9, "mem_len": 0, "reuse_len": 2, "clamp_len": 3, "activation": "gelu_tanh"}
    convert(convert_job(**{"from": folder}, run=tmp_path / "other", model=given))
    config = latest(tmp_path / "other").config["model"]
    assert {key: config[key] for key in given} == given


def test_a_vocabulary_is_lower_cased_as_the_folder_says(tmp_path):
    folder = save_folder(hugging_face_model(), tmp_path / "hf")
    for lower in (True, False):
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
        assert tokenizers.load(import_run(folder, tmp_path / f"run-{lower}") / "tokenizer").lower is lower
    (folder / "spiece.model").unlink()
    assert "tokenizer_from: is missing" in refusal(folder, tmp_path / "run")
    (tmp_path / "given.model").write_bytes(TOKENIZER.model)
    import_run(folder, tmp_path / "run", tokenizer_from=tmp_path / "given.model")
    (tmp_path / "given.model").write_bytes(TOKENIZER.model[:200])
    assert "given.model" in refusal(folder, tmp_path / "third", tokenizer_from=tmp_path / "given.model")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_layer": 4}, "transformer.layer.3.rel_attn.q: is missing"),
        ({"n_layer": 2}, "is not part of the model of the config"),
        ({"n_layer": 10**9}, "model.n_layer=1000000000"),
        ({"d_inner": 24}, "transformer.layer.0.ff.layer_1.weight: has the shape [20, 16]"),
        ({"attn_type": "uni"}, "attn_type='uni': must be bi"),
        ({"same_length": True}, "same_length=True"),
        ({"ff_activation": "swish"}, "ff_activation='swish'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"vocab_size": VOCAB + 1}, "transformer.word_embedding.weight: has the shape"),
        ({"d_model": "16"}, "states d_model='16'"),
        ({"n_head": 0}, "states n_head=0"),
        ({"txl_dist": 3}, "is damaged"),
    ],
)
def test_a_config_that_disagrees_is_refused(changes, message, tmp_path):
    folder = edit_config(save_folder(hugging_face_model(), tmp_path / "hf"), **changes)
    assert message in refusal(folder, tmp_path / "run") and not (tmp_path / "run").exists()


def test_a_softmax_of_its_own_is_refused(tmp_path):
    folder = save_folder(hugging_face_model(), tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_loss.weight"] = tensors["transformer.word_embedding.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    message = refusal(folder, tmp_path / "run")
    assert "lm_loss.weight differs from transformer.word_embedding.weight" in message and "\n" not in message
    torch.save(tensors, tmp_path / "lone.bin")
    assert "give the folder" in refusal(tmp_path / "lone.bin", tmp_path / "run")


# -------------------------------------------------------------------------------------------------- TensorFlow


@pytest.mark.parametrize("shards", [1, 3])
def test_the_authors_checkpoint(shards, tmp_path):
    """With the optimizer's tensors, as training writes it."""
    model = hugging_face_model()
    slots = {f"{name}/adam_{slot}": value for name, value in authors_tensors(model).items() for slot in "mv"}
    slots |= {"global_step": np.array(7, np.int64), "model/lm_loss/bias/Adam": np.ones(VOCAB, np.float32)}
    slots |= {"beta1_power": np.array(0.5, np.float32)}
    folder = save_checkpoint(model, tmp_path / "tf", slots, shards=shards)
    expected = load_weights(import_run(save_folder(model, tmp_path / "hf"), tmp_path / "run"))
    paths = ["", "xlnet_model.ckpt", "xlnet_model.ckpt.index", f"xlnet_model.ckpt.data-00000-of-0000{shards}"]
    for number, name in enumerate(paths):
        run_dir = import_run(folder / name, tmp_path / f"run-{number}")
        assert_same(load_weights(run_dir), expected)
        assert latest(run_dir).state["imported"]["title"] == "the authors' XLNet"
    config = latest(run_dir).config["model"]
    expected_config = LENGTHS | {"mem_len": 384, "activation": "gelu_tanh", "dropout": 0.1, "dropatt": 0.1, "n_head": 4}
    assert {key: config[key] for key in expected_config} == expected_config
    assert txl_dist.load(str(folder / "xlnet_model.ckpt"), **LENGTHS).config.n_layer == SMALL["n_layer"]


def test_the_folder_of_the_authors_training(tmp_path):
    """Its config has another name, and its checkpoints have their step in theirs."""
    folder = save_checkpoint(hugging_face_model(), tmp_path / "tf")
    (folder / "xlnet_config.json").rename(folder / "config.json")
    for path in folder.glob("xlnet_model.ckpt.*"):
        path.rename(folder / path.name.replace("xlnet_model.ckpt", "model.ckpt-100"))
    import_run(folder, tmp_path / "run")
    (folder / "model.ckpt-200.index").write_bytes((folder / "model.ckpt-100.index").read_bytes())
    assert "['model.ckpt-100', 'model.ckpt-200']" in refusal(folder, tmp_path / "other")
    import_run(folder / "model.ckpt-100", tmp_path / "other")
    (folder / "config.json").unlink()
    assert "xlnet_config.json: is missing" in refusal(folder / "model.ckpt-100", tmp_path / "third")


def test_shared_biases_and_missing_parts_are_told(tmp_path):
    model = hugging_face_model()
    layers = [layer.rel_attn for layer in model.transformer.layer]
    shared = {}
    for name in ("r_w_bias", "r_r_bias", "r_s_bias"):
        shared[f"model/transformer/{name}"] = getattr(layers[0], name).detach().numpy()
        for layer in layers:
            getattr(layer, name).data = getattr(layers[0], name).data.clone()
    torch.nn.init.zeros_(model.lm_loss.bias)
    torch.nn.init.zeros_(model.transformer.mask_emb)
    lacking = dict.fromkeys(["model/lm_loss/bias", "model/transformer/mask_emb/mask_emb"])
    head = {"model/classification_imdb/logit/kernel": np.ones((16, 2), np.float32)}
    folder = save_checkpoint(model, tmp_path / "tf", shared | lacking | head, {"untie_r": False})
    run_dir = import_run(folder, tmp_path / "run")
    assert_same(
        load_weights(run_dir), load_weights(import_run(save_folder(model, tmp_path / "hf"), tmp_path / "hf-run"))
    )
    title = latest(run_dir).state["imported"]["title"]
    for note in (
        "without its model/classification_imdb/logit/kernel",
        "copy of the biases",
        "biases of 0",
        "mask_emb: it is 0",
    ):
        assert note in title


@pytest.mark.parametrize(
    "changes, config, message",
    [
        ({"model/transformer/layer_1/rel_attn/q/kernel": None}, {}, "transformer.layer.1.rel_attn.q: is missing"),
        ({"model/transformer/seg_embed": None}, {}, "transformer.layer.0.rel_attn.seg_embed: is missing"),
        ({"model/transformer/seg_embed": np.ones(3, np.float32)}, {}, "seg_embed: has the shape []"),
        ({"model/transformer/new": np.ones(3, np.float32)}, {}, "model/transformer/new, which is no part of XLNet"),
        ({"model/lm_loss/weight": np.ones(3, np.float32)}, {}, "its softmax is not tied"),
        ({"model/lm_loss/bias": np.ones(VOCAB, np.int32)}, {}, "TensorFlow's type 3, which is not one of floats"),
        ({"model/lm_loss/bias": np.ones(3, np.float32)}, {}, "lm_loss.bias: has the shape [3], but the config"),
        ({}, {"n_token": VOCAB + 1}, "the model 91"),
        ({}, {"d_head": 5}, "transformer.layer.0.rel_attn.q: has the shape [16, 4, 4]"),
        ({}, {"ff_activation": "swish"}, "ff_activation='swish': must be gelu or relu"),
        ({}, {"n_layer": 10**9}, "model.n_layer=1000000000"),
        ({}, {"n_layer": None}, "states n_layer=None"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_no_xlnet_is_refused(changes, config, message, tmp_path):
    folder = save_checkpoint(hugging_face_model(), tmp_path / "tf", changes, config)
    text = refusal(folder, tmp_path / "run")
    assert message in text and len(text.splitlines()) <= 3


@pytest.mark.skipif(not (SHARED / "xlnet/tf_pre").is_dir(), reason="needs checkpoints beside the repository")
@pytest.mark.parametrize("name", ["tf_pre", "tf_tune", "tf_empty"])
def test_what_tensorflow_itself_has_written(name, tmp_path):
    source = open_import_source(SHARED / "xlnet" / name)
    config = model_config(convert_job(**{"from": SHARED / "xlnet" / name}, run=tmp_path / "run"), source)
    weights = source.weights(config)
    assert weights.keys() == dict(registry.build(config, source.vocab_size).named_parameters()).keys()
    assert (source.vocab_size, config.n_layer, config.d_model, config.activation) == (31, 2, 6, "gelu_tanh")
    biases = [weights[f"layers.{l}.attention.u"] for l in (0, 1)]
    assert torch.equal(*biases) == (name == "tf_empty") == bool(re.search("copy of the biases", source.title))
    assert ("lm_loss" in source.title) == ("mask_emb" in source.title) == (name != "tf_pre")
