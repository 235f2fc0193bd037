"""Third-party checkpoints, made up: Hugging Face's, the authors' and NVIDIA's; and their import as runs."""

import collections
import json
import re
import sys
import types

import pytest
import torch
from torch import nn
from transformers import TransfoXLConfig, TransfoXLLMHeadModel

from txl_dist.checkpoint.format import latest
from txl_dist.config.parse import parse_config
from txl_dist.config.schema import ConvertJob
from txl_dist.convert import convert
from txl_dist.errors import UserError
from txl_dist.runs.load import load_model

VOCAB, LANES = 50, 3
WORDS = ["<eos>", *(f"w{i}" for i in range(VOCAB - 2)), "<unk>"]  # `<unk>` is not where we would put it
LENGTHS = dict.fromkeys(["tgt_len", "mem_len", "clamp_len", "same_length", "cutoffs", "pre_lnorm"])


def convert_job(**values):
    given = {"from": None, "to": None, "tokenizer_from": None, "checkpoint": None, "pairs": False}
    texts = {key: value if value is None else str(value) for key, value in values.items() if key != "model"}
    return parse_config(ConvertJob, given | texts | {"model": LENGTHS | values.get("model", {})})


def import_run(source, run_dir, **values):
    """Import a checkpoint as a run, and return its directory."""
    convert(convert_job(**{"from": source}, run=run_dir, **values))
    return run_dir


def refusal(*args, **values):
    """The message with which an import, or an export, is refused."""
    with pytest.raises(UserError) as caught:
        import_run(*args, **values)
    return str(caught.value)


def load_run(run_dir, **lengths):
    return load_model(str(run_dir), None, lengths)[0]


def load_weights(run_dir):
    return latest(run_dir).tensors("weights")


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    assert not [name for name in tensors if not torch.equal(tensors[name], expected[name])]


def tokens(*shape, seed=1):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- Hugging Face

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
SHARED_CASES = {name: CASES[name] | {"untie_r": False} for name in CASES}  # one u and v for all layers, as elsewhere


def hugging_face_model(**changes):
    """Hugging Face's model, with weights large enough for every one of them to matter."""
    model = TransfoXLLMHeadModel(TransfoXLConfig(**(SMALL | changes))).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, float("layer_norm.weight" in name), 0.4)
    return model


def save_folder(model, folder, safe=True):
    """Save Hugging Face's folder, with a vocabulary."""
    model.save_pretrained(folder, safe_serialization=safe and model.config.untie_r)  # safetensors know no shared u
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


# ------------------------------------------------------------------------------------------ the authors, NVIDIA


def authors_state(model):
    """The state dict of the authors' code that equals a Hugging Face model with one u and v."""
    state = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"layers\.\d+\.dec_attn\.(r_[wr]_bias)", r"\1", name).removeprefix("transformer.")
        state[name] = value.flip(0) if "cluster_" in name else value
    return state


def nvidia_state(model):
    """The same model's state dict of NVIDIA's code."""
    state = {}
    for name, value in authors_state(model).items():
        if match := re.fullmatch(r"crit\.out_layers\.(\d+)\.(weight|bias)", name):
            if match[2] == "weight" and model.config.tie_word_embeddings:
                continue
            name = f"crit.out_layers_{'weights' if match[2] == 'weight' else 'biases'}.{match[1]}"
        if (match := re.fullmatch(r"crit\.out_projs\.(\d+)", name)) and model.config.tie_projs[int(match[1])]:
            continue
        state[name] = value
        if match := re.fullmatch(r"word_emb\.emb_projs\.(\d+)", name):
            state[f"crit.shared_out_projs.{match[1]}"] = value
    return state


def nvidia_config(model, **changes):
    keys = ["n_layer", "n_head", "d_model", "d_head", "d_inner", "dropout", "dropatt", "d_embed", "div_val"]
    keys += ["pre_lnorm", "mem_len", "cutoffs", "same_length", "attn_type", "clamp_len"]
    values = {key: getattr(model.config, key) for key in keys} | {"n_token": VOCAB, "tgt_len": 5, "ext_len": 0}
    values |= {"tie_weight": model.config.tie_word_embeddings, "tie_projs": model.config.tie_projs, "dtype": None}
    return values | changes


def pickled_class(monkeypatch, module, name, base=object):
    """A class that a pickle names as third-party code does, in a module that exists while it is pickled."""
    if module not in sys.modules:
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    kind = type(name, (base,), {"__module__": module, "__qualname__": name})
    monkeypatch.setattr(sys.modules[module], name, kind, raising=False)
    return kind


def pickled_vocabulary(monkeypatch, words=WORDS, **changes):
    """A vocabulary as the authors and NVIDIA pickle it."""
    vocab = pickled_class(monkeypatch, "vocabulary", "Vocab")()
    attributes = dict(counter=collections.Counter(words), special=["<eos>"], lower_case=False, delimiter=None)
    attributes |= dict(idx2sym=list(words), sym2idx=collections.OrderedDict((word, i) for i, word in enumerate(words)))
    vars(vocab).update(attributes | changes)
    return vocab


def authors_module(monkeypatch, model):
    """A module tree with the authors' classes, names and attributes."""
    kind = pickled_class(monkeypatch, "mem_transformer", "MemTransformerLM", nn.Module)
    part = pickled_class(monkeypatch, "mem_transformer", "Part", nn.Module)
    root = kind()
    parameters = {}
    for name, value in authors_state(model).items():
        *path, last = name.split(".")
        module = root
        for step in path:
            if step not in module._modules:
                module.add_module(step, part())
            module = module._modules[step]
        if "inv_freq" in name:
            module.register_buffer(last, value)
        else:  # a tied parameter is one object
            parameter = parameters.setdefault(value.data_ptr(), nn.Parameter(value))
            module.register_parameter(last, parameter)
    root.drop = nn.Dropout(0.25)
    root.layers._modules["0"].dec_attn.dropatt = nn.Dropout(0.125)
    root.layers._modules["0"].dec_attn.pre_lnorm = model.config.pre_lnorm
    root.word_emb.cutoffs = [*model.config.cutoffs, VOCAB]
    keys = ("d_model", "d_embed", "mem_len", "clamp_len", "same_length", "attn_type")
    vars(root).update({key: getattr(model.config, key) for key in keys} | {"tgt_len": 5, "ext_len": 0})
    return root
