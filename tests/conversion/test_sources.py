"""Checkpoints that are nearly what is expected are read; others are refused with a message that says why."""

import json
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conversion.third_party import (
    CASES,
    SHARED_CASES,
    WORDS,
    assert_same,
    authors_state,
    edit_config,
    hugging_face_model,
    import_run,
    load_weights,
    nvidia_config,
    nvidia_state,
    refusal,
    save_folder,
)


def ddp(state):
    return {f"module.{name}": value for name, value in state.items()}


def renamed(old, new):
    return lambda state: {re.sub(old, new, name): value for name, value in state.items()}


NEARLY = {
    "model": lambda state: {"model": state, "step": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "state_dict, nested": lambda state: {"epoch": 1, "state_dict": {"model": state, "args": None}},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "module, DDP": lambda state: {"module": ddp(state), "rng": torch.zeros(9, dtype=torch.uint8)},
    "DDP": ddp,
    "model.": renamed("^", "model."),
    "compile": renamed("^", "_orig_mod."),
    "DDP of compile": renamed("^", "module._orig_mod."),
    "compile of DDP in a trainer": renamed("^", "model._orig_mod.module."),
    "compile of a part": renamed(r"^transformer\.", "transformer._orig_mod."),
    "float16": lambda state: {name: value.half() for name, value in state.items()},
    "bfloat16": lambda state: {name: value.bfloat16() for name, value in state.items()},
    "float64": lambda state: {name: value.double() for name, value in state.items()},
}


@pytest.mark.parametrize("case", ["full softmax", "as the paper's large model", "pre_lnorm, one u and v"])
def test_a_checkpoint_that_is_nearly_right_is_read(case, tmp_path):
    model = hugging_face_model(**CASES[case])
    folder = save_folder(model, tmp_path / "hf", safe=False)
    expected = load_weights(import_run(folder, tmp_path / "run"))
    for number, (name, change) in enumerate(NEARLY.items()):
        torch.save(change(model.state_dict()), folder / "pytorch_model.bin")
        weights = load_weights(import_run(folder, tmp_path / f"run-{number}"))
        rounding = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(name, torch.float32)
        assert_same(weights, {key: value.to(rounding).float() for key, value in expected.items()})


@pytest.mark.parametrize("wrap", ["model", "DDP", "DDP of compile", "state_dict, nested"])
def test_the_authors_and_nvidias_files_are_unwrapped_too(wrap, tmp_path):
    model = hugging_face_model(**SHARED_CASES["clusters"])
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    expected = load_weights(import_run(save_folder(model, tmp_path / "hf"), tmp_path / "run"))
    lengths = dict(tgt_len=5, mem_len=7, clamp_len=-1, same_length=False, pre_lnorm=False, cutoffs=[10, 20, 35])
    torch.save(NEARLY[wrap](authors_state(model)), tmp_path / "model.pt")
    given = {"tokenizer_from": tmp_path / "vocab.txt"}
    assert_same(load_weights(import_run(tmp_path / "model.pt", tmp_path / "a", model=lengths, **given)), expected)
    state = {"model_config": nvidia_config(model), "model_state": ddp(nvidia_state(model))}
    torch.save({"model": state} if wrap == "model" else state, tmp_path / "nvidia.pt")
    assert_same(load_weights(import_run(tmp_path / "nvidia.pt", tmp_path / "n", **given)), expected)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pytorch_model.bin"])
def test_a_folder_in_parts_is_read(safe, tmp_path):
    model = hugging_face_model(**CASES["clusters"])
    model.save_pretrained(tmp_path / "parts", safe_serialization=safe, max_shard_size="4KB")
    (tmp_path / "parts" / "vocab.txt").write_text("\n".join(WORDS))
    parts = sorted((tmp_path / "parts").glob("*-of-*"))
    assert len(parts) > 3
    expected = load_weights(import_run(save_folder(model, tmp_path / "hf"), tmp_path / "run"))
    assert_same(load_weights(import_run(tmp_path / "parts", tmp_path / "other")), expected)
    parts[1].unlink()
    message = refusal(tmp_path / "parts", tmp_path / "third")
    assert parts[1].name in message and len(message.splitlines()) == 1
    index = next((tmp_path / "parts").glob("*.index.json"))
    index.write_text(json.dumps({"weight_map": {"x": "../hf/model.safetensors"}}))
    assert "../hf/model.safetensors" in refusal(tmp_path / "parts", tmp_path / "third")


def test_a_folder_without_a_head_has_the_softmax_that_its_config_ties(tmp_path):
    for case, message in {"full softmax": None, "full softmax, untied": "not tied", "clusters": "has clusters"}.items():
        model = hugging_face_model(**CASES[case])
        folder = save_folder(model.transformer, tmp_path / case.replace(" ", "-").replace(",", ""))
        names = load_file(folder / "model.safetensors")
        assert not [name for name in names if name.startswith(("transformer", "crit"))]
        if message:
            line = refusal(folder, tmp_path / "run")
            assert message in line and "TransfoXLLMHeadModel" in line and len(line.splitlines()) == 1
            continue
        nn.init.zeros_(model.crit.out_layers[0].bias)
        expected = load_weights(import_run(save_folder(model, tmp_path / "hf"), tmp_path / "first"))
        assert_same(load_weights(import_run(folder, tmp_path / "other")), expected)


def test_unknown_tensors_are_reported_in_one_line(tmp_path):
    model = hugging_face_model()
    folder = save_folder(model, tmp_path / "hf")
    for state in (
        renamed("weight|bias", "w")(model.state_dict()),
        {"a": torch.ones(2)},
        {"n": torch.ones(2).long()},
    ):
        save_file({name: value.clone() for name, value in state.items()}, folder / "model.safetensors")
        assert len(refusal(folder, tmp_path / "run").splitlines()) == 1
    torch.save(model.state_dict(), tmp_path / "lone.bin")
    assert "give the folder" in refusal(tmp_path / "lone.bin", tmp_path / "run")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_layer": 3}, "transformer.layers.2.dec_attn.qkv_net.weight: is missing"),
        ({"n_layer": 1}, "is not part of the model of the config"),
        ({"d_inner": 24}, "transformer.layers.0.pos_ff.CoreNet.0.weight: has the shape [20, 16]"),
        ({"d_embed": 8}, "d_embed=8"),
        ({"attn_type": 2}, "attn_type=2"),
        ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon"),
        (
            {"tie_word_embeddings": True},
            "crit.out_layers.0.weight: differs from transformer.word_emb.emb_layers.0.weight",
        ),
        ({"cutoffs": [60]}, "model.cutoffs=[60]"),
        ({"d_model": 15, "d_embed": 15}, "d_model=15"),
        ({"same_length": True, "mem_len": 0}, "model.same_length"),
        ({"model_type": "albert"}, "model_type=albert"),
        ({"model_type": "xlnet"}, "attn_type=0: must be bi"),
        ({"cutoffs": None}, "states cutoffs=None"),
        ({"div_val": "two"}, "is damaged"),
    ],
)
def test_a_config_that_disagrees_with_the_tensors_is_refused(changes, message, tmp_path):
    folder = save_folder(hugging_face_model(tie_word_embeddings=False), tmp_path / "hf")
    assert message in refusal(edit_config(folder, **changes), tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1]), pickle.dumps({"model": 1})])
def test_a_file_that_is_not_a_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "model.pt").write_bytes(content)
    assert str(tmp_path / "model.pt") in refusal(tmp_path / "model.pt", tmp_path / "run")


def test_damaged_files_are_refused(tmp_path):
    model = hugging_face_model(untie_r=False)
    for new in (True, False):
        torch.save(authors_state(model), tmp_path / "complete.pt", _use_new_zipfile_serialization=new)
        content = (tmp_path / "complete.pt").read_bytes()
        (tmp_path / "model.pt").write_bytes(content[: len(content) * 2 // 3])
        assert str(tmp_path / "model.pt") in refusal(tmp_path / "model.pt", tmp_path / "run")
    folder = save_folder(hugging_face_model(), tmp_path / "hf")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    assert "model.safetensors" in refusal(folder, tmp_path / "run")
    (folder / "model.safetensors").unlink()
    assert "pytorch_model.bin" in refusal(folder, tmp_path / "run")
