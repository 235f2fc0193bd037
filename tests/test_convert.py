"""Checkpoints in (Hugging Face, the authors, NVIDIA) and out (transformers 5): the same numbers everywhere."""

import collections
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TransfoXLConfig, TransfoXLLMHeadModel

from txl_dist.checkpoint.format import latest
from txl_dist.config.checks import parse_config
from txl_dist.config.schema import ConvertJob, GenerateJob, LengthsConfig
from txl_dist.convert import convert
from txl_dist.data import tokenizers
from txl_dist.errors import UserError
from txl_dist.generate import continuations
from txl_dist.runs.load import load_model

VOCAB, LANES = 50, 3
WORDS = ["<eos>", *(f"w{i}" for i in range(VOCAB - 2)), "<unk>"]  # with `<unk>` at another place than we would put it
LENGTHS = dict.fromkeys(["tgt_len", "mem_len", "clamp_len", "same_length", "cutoffs", "pre_lnorm"])


def job(**values):
    given = {"from": None, "to": None, "tokenizer_from": None, "checkpoint": None}
    texts = {key: value if value is None else str(value) for key, value in values.items() if key != "model"}
    return parse_config(ConvertJob, given | texts | {"model": LENGTHS | values.get("model", {})})


def bring_in(source, run_dir, **values):
    convert(job(**{"from": source}, run=run_dir, **values))
    return run_dir


def refused(*args, **values):
    with pytest.raises(UserError) as caught:
        bring_in(*args, **values)
    return str(caught.value)


def model_of(run_dir, **lengths):
    given = LengthsConfig(**(dict(tgt_len=None, mem_len=None, clamp_len=None, same_length=None) | lengths))
    return load_model(str(run_dir), None, given)[0]


def weights_of(run_dir):
    return latest(run_dir).tensors("weights")


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def tokens(*shape, seed=1):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ Hugging Face

SMALL = dict(vocab_size=VOCAB, d_model=16, d_embed=16, n_head=2, d_head=6, d_inner=20, n_layer=2, mem_len=7)
SMALL |= dict(cutoffs=[], div_val=1, clamp_len=-1, same_length=False, dropout=0.1, dropatt=0.0)
CASES = {
    "full softmax": {},
    "full softmax, untied": {"tie_word_embeddings": False},
    "clusters": {"cutoffs": [10, 20, 35]},
    "div_val 2": {"cutoffs": [10, 20], "div_val": 2},
    "div_val 2, nothing tied": {
        "cutoffs": [10, 20],
        "div_val": 2,
        "tie_word_embeddings": False,
        "proj_share_all_but_first": False,
    },
    "div_val 4, own projections": {"cutoffs": [5, 30], "div_val": 4, "proj_share_all_but_first": False},
    "one projection tied": {"cutoffs": [10, 20], "div_val": 2, "tie_projs": [False, True, False]},
    "all projections tied": {"cutoffs": [10, 20], "div_val": 2, "tie_projs": [True, True, True]},
    "as the paper's large model": {"cutoffs": [10, 20], "div_val": 4, "same_length": True, "clamp_len": 4},
    "pre_lnorm, one u and v": {"pre_lnorm": True, "untie_r": False},
}

TIED = {"div_val 2", "all projections tied", "as the paper's large model"}  # by our one switch; else they are copies


def theirs(**changes):
    """Hugging Face's model, with weights large enough for every one of them to matter."""
    model = TransfoXLLMHeadModel(TransfoXLConfig(**(SMALL | changes))).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, float("layer_norm.weight" in name), 0.4)
    return model


def saved(model, folder, safe=True):
    model.save_pretrained(folder, safe_serialization=safe and model.config.untie_r)  # safetensors know no shared u
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    return folder


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_losses_with_memory_are_hugging_faces(case, safe, tmp_path):
    """Theirs begins with mem_len zeros that every token sees: to ours, as if as many tokens had been read."""
    reference = theirs(**CASES[case])
    model = model_of(bring_in(saved(reference, tmp_path / "hf", safe), tmp_path / "run"))
    mems, memory = None, model.empty_memory(LANES)
    for step in range(5):
        inputs, targets = tokens(LANES, 5, seed=step), tokens(LANES, 5, seed=50 + step)
        read = model.config.mem_len + 5 * step
        nll, memory = model(inputs, targets, torch.arange(parse_config, read + 5).expand(LANES, 5), memory)
        output = reference(inputs, mems=mems)
        mems = output.mems
        expected = -output.prediction_scores.gather(-1, targets[..., None]).squeeze(-1)
        torch.testing.assert_close(nll, expected, rtol=0, atol=1e-5)
    assert model.config.tie_weights == reference.config.tie_word_embeddings
    assert model.config.tie_projections == (case in TIED)


@pytest.mark.parametrize("file", ["vocab.txt", "vocab.pkl", "vocab.bin"])
def test_a_folder_tells_its_lengths_and_words(file, tmp_path):
    folder = saved(theirs(mem_len=9, same_length=True), tmp_path / "hf")
    if file != "vocab.txt":
        (folder / "vocab.txt").unlink()
        facts = {"idx2sym": WORDS, "lower_case": False, "delimiter": None, "pattern": re.compile("x"), "set": {1}}
        torch.save(facts, folder / file) if file == "vocab.bin" else (folder / file).write_bytes(pickle.dumps(facts))
    run_dir = bring_in(folder, tmp_path / "run")
    config = model_of(run_dir).config
    assert (config.mem_len, config.same_length, config.clamp_len, config.dropout) == (9, True, -1, 0.1)
    assert tokenizers.load(run_dir / "tokenizer").words == WORDS
    given = {"mem_len": 3, "tgt_len": 4, "clamp_len": 2}
    config = model_of(bring_in(tmp_path / "hf", tmp_path / "other", model=given)).config
    assert (config.mem_len, config.tgt_len, config.clamp_len) == (3, 4, 2)


# ---------------------------------------------------------------------------------------- the authors, NVIDIA


def authors_names(model):
    """A state dict as the authors' code has it, of a Hugging Face model with one u and v."""
    found = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"layers\.\d+\.dec_attn\.(r_[wr]_bias)", r"\1", name).removeprefix("transformer.")
        found[name] = value.flip(0) if "cluster_" in name else value
    return found


def nvidia_names(model):
    found = {}
    for name, value in authors_names(model).items():
        if match := re.fullmatch(r"crit\.out_layers\.(\d+)\.(weight|bias)", name):
            if match[2] == "weight" and model.config.tie_word_embeddings:
                continue
            name = f"crit.out_layers_{'weights' if match[2] == 'weight' else 'biases'}.{match[1]}"
        if (match := re.fullmatch(r"crit\.out_projs\.(\d+)", name)) and model.config.tie_projs[int(match[1])]:
            continue
        found[name] = value
        if match := re.fullmatch(r"word_emb\.emb_projs\.(\d+)", name):
            found[f"crit.shared_out_projs.{match[1]}"] = value
    return found


def nvidia_config(model, **changes):
    keys = [
        "n_layer",
        "n_head",
        "d_model",
        "d_head",
        "d_inner",
        "dropout",
        "dropatt",
        "d_embed",
        "div_val",
        "pre_lnorm",
    ]
    keys += ["mem_len", "cutoffs", "same_length", "attn_type", "clamp_len"]
    values = {key: getattr(model.config, key) for key in keys} | {"n_token": VOCAB, "tgt_len": 5, "ext_len": 0}
    values |= {"tie_weight": model.config.tie_word_embeddings, "tie_projs": model.config.tie_projs, "dtype": None}
    return values | changes


def foreign_class(monkeypatch, module, name, base=object):
    """A class that pickle knows by the name that it has in another house, while it is pickled."""
    if module not in sys.modules:
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    kind = type(name, (base,), {"__module__": module, "__qualname__": name})
    monkeypatch.setattr(sys.modules[module], name, kind, raising=False)
    return kind


def vocabulary(monkeypatch, words=WORDS, **changes):
    vocab = foreign_class(monkeypatch, "vocabulary", "Vocab")()
    facts = dict(counter=collections.Counter(words), special=["<eos>"], lower_case=False, delimiter=None)
    facts |= dict(idx2sym=list(words), sym2idx=collections.OrderedDict((word, i) for i, word in enumerate(words)))
    vars(vocab).update(facts | changes)
    return vocab


def authors_module(monkeypatch, model, **facts):
    """A module tree with the authors' classes, names and attributes."""
    kind = foreign_class(monkeypatch, "mem_transformer", "MemTransformerLM", nn.Module)
    part = foreign_class(monkeypatch, "mem_transformer", "Part", nn.Module)
    root = kind()
    parameters = {}
    for name, value in authors_names(model).items():
        *path, last = name.split(".")
        here = root
        for step in path:
            if step not in here._modules:
                here.add_module(step, part())
            here = here._modules[step]
        if "inv_freq" in name:
            here.register_buffer(last, value)
        else:
            tied = next((each for each in parameters.values() if each.data_ptr() == value.data_ptr()), None)
            parameters[name] = nn.Parameter(value) if tied is None else tied
            here.register_parameter(last, parameters[name])
    root.drop = nn.Dropout(0.25)
    root.layers._modules["0"].dec_attn.dropatt = nn.Dropout(0.125)
    root.layers._modules["0"].dec_attn.pre_lnorm = model.config.pre_lnorm
    root.word_emb.cutoffs = [*model.config.cutoffs, VOCAB]
    keys = ("d_model", "d_embed", "mem_len", "clamp_len", "same_length", "attn_type")
    vars(root).update({key: getattr(model.config, key) for key in keys} | {"tgt_len": 5, "ext_len": 0} | facts)
    return root


SHARED = {name: CASES[name] | {"untie_r": False} for name in CASES}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("case", CASES)
def test_the_authors_module(case, new, tmp_path, monkeypatch):
    model = theirs(**SHARED[case])
    module = authors_module(monkeypatch, model)
    torch.save(module, tmp_path / "model.pt", _use_new_zipfile_serialization=new)
    corpus = foreign_class(monkeypatch, "data_utils", "Corpus")()
    corpus.vocab, corpus.train = vocabulary(monkeypatch), torch.arange(5)
    torch.save(corpus, tmp_path / "cache.pt", _use_new_zipfile_serialization=new)
    for name in ("mem_transformer", "vocabulary", "data_utils"):
        monkeypatch.delitem(sys.modules, name)  # nothing of theirs is needed to read it
    run_dir = bring_in(tmp_path / "model.pt", tmp_path / "run")
    assert_same(weights_of(run_dir), weights_of(bring_in(saved(model, tmp_path / "hf"), tmp_path / "other")))
    assert model_of(run_dir).config == replace(
        model_of(tmp_path / "other").config, tgt_len=5, dropout=0.25, dropatt=0.125
    )
    assert tokenizers.load(run_dir / "tokenizer").words == WORDS


@pytest.mark.parametrize("case", ["full softmax", "clusters", "div_val 2, nothing tied"])
def test_the_authors_state_dict_wants_to_be_told_lengths(case, tmp_path):
    model, words = theirs(**SHARED[case]), tmp_path / "vocab.txt"
    torch.save(authors_names(model), tmp_path / "model.pt")
    told = refused(tmp_path / "model.pt", tmp_path / "run")
    keys = ["tgt_len", "mem_len", "clamp_len", "same_length", "pre_lnorm"] + ["cutoffs"] * (case == "clusters")
    assert all(f"model.{key}: is missing" in told for key in keys) and "tokenizer_from: is missing" in told
    assert len(told.splitlines()) == len(keys) + 1
    saved(model, tmp_path / "hf")
    words.write_text((tmp_path / "hf" / "vocab.txt").read_text())
    lengths = dict(tgt_len=5, mem_len=7, clamp_len=-1, same_length=False, pre_lnorm=False)
    given = lengths | {"cutoffs": model.config.cutoffs}
    run_dir = bring_in(tmp_path / "model.pt", tmp_path / "run", tokenizer_from=words, model=given)
    assert_same(weights_of(run_dir), weights_of(bring_in(tmp_path / "hf", tmp_path / "other")))


@pytest.mark.parametrize("case", CASES)
def test_nvidias_checkpoint(case, tmp_path, monkeypatch):
    model = theirs(**SHARED[case])
    vocab = vocabulary(monkeypatch)
    state = {"model_config": nvidia_config(model), "model_state": nvidia_names(model), "vocab": vocab, "epoch": 1}
    torch.save(state | {"optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}}}, tmp_path / "checkpoint_best.pt")
    monkeypatch.delitem(sys.modules, "vocabulary")
    run_dir = bring_in(tmp_path / "checkpoint_best.pt", tmp_path / "run")
    assert_same(weights_of(run_dir), weights_of(bring_in(saved(model, tmp_path / "hf"), tmp_path / "other")))
    config = model_of(run_dir).config
    # A token of theirs sees mem_len others and itself.
    assert config == replace(model_of(tmp_path / "other").config, tgt_len=5, mem_len=7 + config.same_length)


def test_clusters_counted_from_the_end(tmp_path):
    """The authors' formula, from the tensors as they are in the file: tail i is column -i of the head."""
    state = authors_names(theirs(**SHARED["div_val 2"]))
    torch.save(state, tmp_path / "model.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    lengths = dict(tgt_len=5, mem_len=7, clamp_len=-1, same_length=False, pre_lnorm=False)
    run_dir = bring_in(tmp_path / "model.pt", tmp_path / "run", tokenizer_from=tmp_path / "vocab.txt", model=lengths)
    hidden = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    parts = [
        (
            hidden @ state[f"crit.out_projs.{i}"],
            state[f"crit.out_layers.{i}.weight"],
            state[f"crit.out_layers.{i}.bias"],
        )
        for i in range(3)
    ]
    narrow, table, bias = parts[0]
    head = narrow @ torch.cat([table, state["crit.cluster_weight"]]).T
    head = (head + torch.cat([bias, state["crit.cluster_bias"]])).log_softmax(-1)
    tails = [(narrow @ table.T + bias).log_softmax(-1) for narrow, table, bias in parts[1:]]
    expected = torch.cat([head[:, :10], *(head[:, [-i]] + tail for i, tail in enumerate(tails, 1))], dim=-1)
    log_probs = model_of(run_dir).softmax(hidden[None], None)[0]
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)


def test_shared_u_and_v_become_each_layers(tmp_path):
    model = theirs(n_layer=3, untie_r=False)
    weights = weights_of(bring_in(saved(model, tmp_path / "hf"), tmp_path / "run"))
    for layer in range(3):
        assert torch.equal(weights[f"layers.{layer}.attention.u"], model.transformer.r_w_bias)
        assert torch.equal(weights[f"layers.{layer}.attention.v"], model.transformer.r_r_bias)


# ------------------------------------------------------------------------------------------------- nearly right


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
    model = theirs(**CASES[case])
    folder = saved(model, tmp_path / "hf", safe=False)
    expected = weights_of(bring_in(folder, tmp_path / "run"))
    for number, (name, change) in enumerate(NEARLY.items()):
        torch.save(change(model.state_dict()), folder / "pytorch_model.bin")
        found = weights_of(bring_in(folder, tmp_path / f"run-{number}"))
        if "float16" in name:
            expected_here = {
                key: getattr(value, "half" if name == "float16" else "bfloat16")().float()
                for key, value in expected.items()
            }
            assert_same(found, expected_here)
        else:
            assert_same(found, expected)


@pytest.mark.parametrize("wrap", ["model", "DDP", "DDP of compile", "state_dict, nested"])
def test_the_authors_and_nvidias_files_are_unwrapped_too(wrap, tmp_path):
    model = theirs(**SHARED["clusters"])
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    expected = weights_of(bring_in(saved(model, tmp_path / "hf"), tmp_path / "run"))
    lengths = dict(tgt_len=5, mem_len=7, clamp_len=-1, same_length=False, pre_lnorm=False, cutoffs=[10, 20, 35])
    torch.save(NEARLY[wrap](authors_names(model)), tmp_path / "model.pt")
    given = {"tokenizer_from": tmp_path / "vocab.txt"}
    assert_same(weights_of(bring_in(tmp_path / "model.pt", tmp_path / "a", model=lengths, **given)), expected)
    state = {"model_config": nvidia_config(model), "model_state": ddp(nvidia_names(model))}
    torch.save({"model": state} if wrap == "model" else state, tmp_path / "nvidia.pt")
    assert_same(weights_of(bring_in(tmp_path / "nvidia.pt", tmp_path / "n", **given)), expected)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pytorch_model.bin"])
def test_a_folder_in_parts_is_read(safe, tmp_path):
    model = theirs(**CASES["clusters"])
    model.save_pretrained(tmp_path / "parts", safe_serialization=safe, max_shard_size="4KB")
    (tmp_path / "parts" / "vocab.txt").write_text("\n".join(WORDS))
    parts = sorted((tmp_path / "parts").glob("*-of-*"))
    assert len(parts) > 3
    expected = weights_of(bring_in(saved(model, tmp_path / "hf"), tmp_path / "run"))
    assert_same(weights_of(bring_in(tmp_path / "parts", tmp_path / "other")), expected)
    parts[1].unlink()
    told = refused(tmp_path / "parts", tmp_path / "third")
    assert parts[1].name in told and len(told.splitlines()) == 1
    index = next((tmp_path / "parts").glob("*.index.json"))
    index.write_text(json.dumps({"weight_map": {"x": "../hf/model.safetensors"}}))
    assert "../hf/model.safetensors" in refused(tmp_path / "parts", tmp_path / "third")


def test_a_folder_without_a_head_has_the_softmax_that_its_config_ties(tmp_path):
    for case, told in {"full softmax": None, "full softmax, untied": "not tied", "clusters": "has clusters"}.items():
        model, place = theirs(**CASES[case]), tmp_path / case.replace(" ", "-").replace(",", "")
        saved(model.transformer, place)
        assert not [name for name in load_file(place / "model.safetensors") if name.startswith(("transformer", "crit"))]
        if told:
            line = refused(place, tmp_path / "run")
            assert told in line and "TransfoXLLMHeadModel" in line and len(line.splitlines()) == 1
            continue
        nn.init.zeros_(model.crit.out_layers[0].bias)
        expected = weights_of(bring_in(saved(model, tmp_path / "hf"), tmp_path / "first"))
        assert_same(weights_of(bring_in(place, tmp_path / "other")), expected)


def test_what_cannot_be_read_is_told_in_one_line(tmp_path):
    model = theirs()
    folder = saved(model, tmp_path / "hf")
    for number, state in enumerate(
        [renamed("weight|bias", "w")(model.state_dict()), {"a": torch.ones(2)}, {"n": torch.ones(2).long()}]
    ):
        save_file({name: value.clone() for name, value in state.items()}, folder / "model.safetensors")
        told = refused(folder, tmp_path / "run")
        assert len(told.splitlines()) == 1, (number, told)
    torch.save(model.state_dict(), tmp_path / "lone.bin")
    assert "give the folder" in refused(tmp_path / "lone.bin", tmp_path / "run")


# -------------------------------------------------------------------------------------------- nothing executed


class Attack:
    """What a pickle can do: create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "place", ["model.pt", "old.pt", "in a state dict", "pytorch_model.bin", "vocab.pkl", "protocol 0"]
)
def test_a_malicious_pickle_is_refused_and_not_executed(place, tmp_path):
    attack, path = Attack(tmp_path / "executed"), tmp_path / "model.pt"
    if place == "pytorch_model.bin":
        path = saved(theirs(), tmp_path / "hf", safe=False)
        torch.save({"x": attack}, path / place)
    elif place == "vocab.pkl":
        path = saved(theirs(), tmp_path / "hf")
        (path / "vocab.txt").unlink()
        (path / place).write_bytes(pickle.dumps({"idx2sym": attack}))
    elif place == "protocol 0":
        path.write_bytes(pickle.dumps(attack, protocol=0))
    elif place == "in a state dict":
        torch.save({"r_w_bias": torch.ones(2, 6), "x": attack}, path)
    else:
        torch.save(attack, path, _use_new_zipfile_serialization=place == "model.pt")
    told = refused(path, tmp_path / "run")
    assert "mkdir" in told and str(path) in told and len(told.splitlines()) == 1
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run").exists()
    pickle.loads(pickle.dumps(attack))
    assert (tmp_path / "executed").exists()  # so it would have been


# ---------------------------------------------------------------------------------------------------- mistakes


def test_all_that_is_wrong_with_a_source_is_told_at_once(tmp_path):
    folder = saved(theirs(cutoffs=[10, 20], div_val=2), tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.layers.1.dec_attn.r_net.weight"]
    tensors["crit.cluster_bias"] = torch.zeros(3)
    tensors["crit.new"] = torch.zeros(4, 5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in [*WORDS, "more"]))
    told = refused(folder, tmp_path / "run").splitlines()
    assert len(told) == 4 and not (tmp_path / "run").exists()
    assert told[0].startswith(f"from={folder}") and "51 tokens" in told[0] and "50" in told[0]
    assert any(line.startswith("transformer.layers.1.dec_attn.r_net.weight: is missing") for line in told)
    assert any(line.startswith("crit.cluster_bias: has the shape [3]") and "[2]" in line for line in told)
    assert any(line.startswith("crit.new") and "[4, 5]" in line for line in told)


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"n_layer": 3}, "transformer.layers.2.dec_attn.qkv_net.weight: is missing"),
        ({"n_layer": 1}, "has no place in the model of the config"),
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
        ({"model_type": "xlnet"}, "model_type=xlnet"),
        ({"cutoffs": None}, "tells cutoffs=None"),
        ({"div_val": "two"}, "is damaged"),
    ],
)
def test_a_config_that_disagrees_is_told(changes, told, tmp_path):
    folder = saved(theirs(tie_word_embeddings=False), tmp_path / "hf")
    assert told in refused(edited(folder, **changes), tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1]), pickle.dumps({"model": 1})])
def test_a_file_that_is_no_checkpoint(content, tmp_path):
    (tmp_path / "model.pt").write_bytes(content)
    assert str(tmp_path / "model.pt") in refused(tmp_path / "model.pt", tmp_path / "run")


def test_damaged_files_are_told(tmp_path):
    model = theirs(untie_r=False)
    for new in (True, False):
        torch.save(authors_names(model), tmp_path / "whole.pt", _use_new_zipfile_serialization=new)
        content = (tmp_path / "whole.pt").read_bytes()
        (tmp_path / "model.pt").write_bytes(content[: len(content) * 2 // 3])
        assert str(tmp_path / "model.pt") in refused(tmp_path / "model.pt", tmp_path / "run")
    folder = saved(theirs(), tmp_path / "hf")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    assert "model.safetensors" in refused(folder, tmp_path / "run")
    (folder / "model.safetensors").unlink()
    assert "pytorch_model.bin" in refused(folder, tmp_path / "run")


@pytest.mark.parametrize("changes, told", [({"lower_case": True}, "lower_case"), ({"delimiter": ""}, "delimiter")])
def test_words_that_are_made_otherwise_are_refused(changes, told, tmp_path, monkeypatch):
    model = theirs(untie_r=False)
    state = {"model_config": nvidia_config(model), "model_state": nvidia_names(model)}
    torch.save(state | {"vocab": vocabulary(monkeypatch, **changes)}, tmp_path / "model.pt")
    assert told in refused(tmp_path / "model.pt", tmp_path / "run")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    bring_in(tmp_path / "model.pt", tmp_path / "run", tokenizer_from=tmp_path / "vocab.txt")  # then it is not looked at


def test_a_vocabulary_without_eos_is_refused(tmp_path):
    folder = saved(theirs(), tmp_path / "hf")
    (folder / "vocab.txt").write_text("".join(f"w{i}\n" for i in range(VOCAB)))
    told = refused(folder, tmp_path / "run")
    assert "<eos>" in told and "<unk>" in told


def test_directions_and_places(tmp_path):
    folder = saved(theirs(), tmp_path / "hf")
    assert "from, to" in refused(None, tmp_path / "run")
    assert "from, to" in refused(folder, tmp_path / "run", to=tmp_path / "out")
    assert "there is no such" in refused(tmp_path / "nowhere", tmp_path / "run")
    assert f"run={folder}: is there already" in refused(folder, folder)
    run_dir = bring_in(folder, tmp_path / "run")
    assert "is there already" in refused(None, run_dir, to=folder)
    told = refused(None, run_dir, to=tmp_path / "out", tokenizer_from="x", model={"cutoffs": [3]})
    assert "tokenizer_from=x" in told and "model.cutoffs" in told
    assert "run=" in refused(None, tmp_path / "none", to=tmp_path / "out")
    assert "model.mem_len=0" in refused(None, run_dir, to=tmp_path / "out", model={"mem_len": 0})
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------- an imported run


def test_an_imported_run_is_evaluated_inspected_and_generated_from(run, tmp_path):
    """On data prepared with the imported words; on others, and for training, it is refused."""
    folder = saved(theirs(), tmp_path / "hf")
    run_dir = tmp_path / "run"
    assert "parameters" in run("txl_dist.convert", f"from={folder}", f"run={run_dir}").stdout
    text = "".join(f"w{i % 13} w{i % 7}\nother w{i % 40}\n" for i in range(200))
    (tmp_path / "text.txt").write_text(text)
    prepared = ["corpus=text", f"corpus.path={tmp_path / 'text.txt'}", "corpus.valid_share=0.2", "tokenizer=word"]
    vocab = f"tokenizer.vocab={run_dir / 'tokenizer' / 'vocab.txt'}"
    run("txl_dist.prepare", *prepared, vocab, f"data.dir={tmp_path / 'data'}")
    run("txl_dist.prepare", *prepared, f"data.dir={tmp_path / 'other'}")
    command = ["txl_dist.evaluate", f"run={run_dir}", "split=valid", "format=json", "num_lanes=2"]
    told = json.loads(run(*command, f"data_dir={tmp_path / 'data'}").stdout)
    assert told["step"] == 0 and 0 < told["loss"] < 20
    assert "tokenizer" in run(*command, f"data_dir={tmp_path / 'other'}", expect=2).stderr
    assert "data_dir: is missing" in run(*command, expect=2).stderr
    inspected = run("txl_dist.inspect", f"run={run_dir}", "verify=true").stdout
    assert str(folder) in inspected and "vocabulary of 50" in inspected
    facts = json.loads(run("txl_dist.inspect", f"run={run_dir}", "format=json").stdout)
    assert facts["imported"]["from"] == str(folder) and facts["holds"].keys() == {"weights"}
    assert run("txl_dist.generate", f"run={run_dir}", "prompt=w1 w2", "max_tokens=5").stdout.startswith("w1 w2 ")
    train = ["txl_dist.train", f"run.dir={run_dir}", f"data.dir={tmp_path / 'data'}", "tracking.mode=disabled"]
    done = run(*train, "data.num_lanes=2", expect=2)
    assert "imported" in done.stderr and "Traceback" not in done.stderr
    # With the dataset given at the import, evaluate finds it by itself.
    run("txl_dist.convert", f"from={folder}", f"run={tmp_path / 'third'}", f"tokenizer_from={tmp_path / 'data'}")
    assert json.loads(run(command[0], f"run={tmp_path / 'third'}", *command[2:]).stdout)["loss"] == told["loss"]


# ------------------------------------------------------------------------------------------ out: transformers 5


@pytest.fixture(scope="session")
def transformers5(request):
    """The environment of a process that imports transformers 5; it is installed once, and kept with pytest's cache."""
    pins = Path(__file__).with_name("transformers5.txt")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = hashlib.sha256(f"{version} {pins.read_text()}".encode()).hexdigest()[:12]
    folder = request.config.cache.mkdir("transformers5") / name
    if not folder.exists():
        partial = folder.with_name(f"{name}.partial")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        subprocess.run([*command, "--target", str(partial), "--requirement", str(pins)], check=True)
        partial.rename(folder)
    return {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


PIECES = [
    f"    the {kind} of a {place}, {n}" for n in range(40) for kind in ("one", "sum") for place in ("sea", "house")
]
TOKENIZERS = {
    "bytes": tokenizers.BytesTokenizer(),
    "word": tokenizers.WordTokenizer(WORDS),
    "sentencepiece": tokenizers.SentencePieceTokenizer.train(PIECES, 288, "unigram"),
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
    place = tmp_path_factory.mktemp("runs")
    for name in CASES:
        folder = saved(theirs(**CASES[name]), place / "hf" / name)
        bring_in(folder, place / name, model={"tgt_len": 5})
    run("txl_dist.train", *small, f"run.dir={place / 'bytes'}")
    size = TOKENIZERS["sentencepiece"].vocab_size
    folder = saved(theirs(vocab_size=size), place / "hf" / "sentencepiece")
    (folder / "vocab.txt").write_text("\n".join([*WORDS, *(f"more{i}" for i in range(size - VOCAB))]))
    bring_in(folder, place / "sentencepiece", model={"tgt_len": 5})
    shutil.rmtree(place / "sentencepiece" / "tokenizer")
    TOKENIZERS["sentencepiece"].save(place / "sentencepiece" / "tokenizer")
    return {name: place / name for name in EXPORTS}


@pytest.fixture(scope="session")
def exported(runs, transformers5, tmp_path_factory):
    """Of each exported run its place, and the tensors and facts that transformers 5 finds there."""
    place = tmp_path_factory.mktemp("exported")
    for name, run_dir in runs.items():
        case = place / name.replace(" ", "_").replace(",", "")
        case.mkdir()
        convert(job(run=run_dir, to=case / "folder"))
        size = latest(run_dir).data["vocab_size"]
        stream = torch.randint(size, (LANES, LONG), generator=torch.Generator().manual_seed(3))
        save_file({"stream": stream}, case / "input.safetensors")
        (case / "texts.json").write_text(json.dumps(TEXTS))
    cases = sorted(place.iterdir())
    environment = os.environ | transformers5 | {"HF_HOME": str(place.with_name("hugging_face"))}
    script = Path(__file__).with_name("exported.py")
    done = subprocess.run([sys.executable, script, *cases], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return {name: place / name.replace(" ", "_").replace(",", "") for name in runs}


@pytest.fixture(params=EXPORTS)
def case(request, runs, exported):
    """A run's directory, what is exported of it, and the tensors and facts of transformers 5."""
    place = exported[request.param]
    return (
        runs[request.param],
        place,
        load_file(place / "output.safetensors"),
        json.loads((place / "output.json").read_text()),
    )


@torch.no_grad()
def log_probs(model, stream):
    """Of ours, read in segments from an empty memory."""
    memory, start, out = model.empty_memory(len(stream)), 0, []
    for segment in stream.split(model.config.tgt_len, dim=1):
        lookback = torch.arange(start, start + segment.size(1)).expand_as(segment)
        found, memory = model(segment, None, lookback, memory)
        out.append(found)
        start += segment.size(1)
    return torch.cat(out, dim=1)


def test_transformers_5_finds_our_numbers(case):
    run_dir, place, found, _ = case
    stream = load_file(place / "input.safetensors")["stream"]
    expected = log_probs(model_of(run_dir), stream)
    assert latest(run_dir).config["model"]["mem_len"] + latest(run_dir).config["model"]["tgt_len"] < LONG
    assert (found["logits"] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found["pieces"] - found["logits"]).abs().max() <= 1e-5 * expected.abs().max()
    loss = -expected[:, :-1].gather(-1, stream[:, 1:, None]).mean()
    torch.testing.assert_close(found["loss"], loss, rtol=0, atol=1e-5)


def test_transformers_5_generates_our_text(case):
    """Greedily, token by token with memory; alone, beside a longer prompt, and without a cache."""
    run_dir, place, found, facts = case
    stream, model = load_file(place / "input.safetensors")["stream"], model_of(run_dir)
    length = model.config.tgt_len
    asked = GenerateJob(str(run_dir), None, 20, 0.0, 0, 1.0, 1, None, False, LengthsConfig(None, None, None, None))
    for key, prompts in (("greedy", stream[:1, :length]), ("short", stream[1:, : length - 2])):
        expected = list(islice(continuations(model, prompts.tolist(), asked), 20))
        assert found[key].tolist() == torch.cat([prompts, torch.tensor(expected).T], dim=1).tolist()
    assert found["together"][0].tolist() == found["greedy"][0].tolist()
    assert found["together"][1:, 2:].tolist() == found["short"].tolist()
    assert found["beams"].shape == found["greedy"].shape
    # A token more costs one row in every linear layer, and the memory stays as long as it is.
    assert set(facts["work"]["rows"]) == {1} and facts["work"]["kept"] == model.config.mem_len


def test_the_tokenizer_is_ours(case):
    run_dir, place, _, facts = case
    tokenizer = tokenizers.load(run_dir / "tokenizer")
    assert facts["vocabulary"] == [tokenizer.vocab_size] * 2
    for text, ids, decoded in zip(TEXTS, facts["ids"], facts["decoded"], strict=True):
        expected = tokenizer.encode(text.encode(), False).tolist()
        assert ids == [tokenizer.eos, *expected]
        assert decoded == tokenizer.decode(expected)


def test_weights_come_back_to_the_bit(case, tmp_path):
    """What is exported, and what transformers 5 has saved of it, imported again."""
    run_dir, place, _, facts = case
    before = latest(run_dir)
    for name in ("folder", "again"):
        after = latest(bring_in(place / name, tmp_path / name))
        assert_same(after.tensors("weights"), before.tensors("weights"))
        assert after.config["model"] == before.config["model"]
        assert after.data["vocab_size"] == before.data["vocab_size"]
        for path in (run_dir / "tokenizer").iterdir():
            assert (tmp_path / name / "tokenizer" / path.name).read_bytes() == path.read_bytes()
    assert facts["parameters"] == {key: list(value.shape) for key, value in before.tensors("weights").items()}


def test_the_folder_names_nothing_of_ours(exported):
    for path in (exported["bytes"] / "folder").glob("*.py"):
        assert "import txl_dist" not in path.read_text() and "from txl_dist" not in path.read_text()


def test_lengths_can_be_given_at_the_export(runs, tmp_path):
    convert(job(run=runs["bytes"], to=tmp_path / "out", model={"mem_len": 64, "same_length": True}))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mem_len"], config["same_length"], config["tgt_len"]) == (64, True, 16)


def test_other_attention_is_not_exported(run, small, tmp_path):
    run("txl_dist.train", *small, f"run.dir={tmp_path / 'run'}", "model.attention=shaw", "train.stop_at=1")
    told = refused(None, tmp_path / "run", to=tmp_path / "out")
    assert "model.attention=shaw" in told and not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(runs, tmp_path):
    shutil.copytree(runs["full softmax"], tmp_path / "run")
    path = next(latest(tmp_path / "run").path.glob("weights-*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert path.name in refused(None, tmp_path / "run", to=tmp_path / "out") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_an_import_and_an_export_have_the_modes_of_any_new_file(umask, mode, tmp_path):
    folder = saved(theirs(), tmp_path / "hf")
    before = os.umask(umask)
    try:
        bring_in(folder, tmp_path / "run")
        convert(job(run=tmp_path / "run", to=tmp_path / "out"))
    finally:
        os.umask(before)
    files = [path for name in ("run", "out") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert len(files) > 8 and {oct(path.stat().st_mode & 0o777) for path in files} == {oct(mode)}
