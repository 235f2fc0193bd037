"""Third-party XLNet checkpoints, made up: Hugging Face's folders, TensorFlow's bundles; and their import as runs."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import XLNetConfig, XLNetLMHeadModel

from txl_dist.config.parse import parse_config
from txl_dist.config.schema import ConvertJob
from txl_dist.convert import convert
from txl_dist.data.tokenizers import XLNetTokenizer
from txl_dist.errors import UserError

SHARED = Path(__file__).parents[2] / "../shared/data"
PUBLISHED = SHARED / "xlnet" / "spiece.model"
needs_published = pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"needs the published vocabulary, {PUBLISHED}")

LINES = [f"In {year}, the {noun} of 3,{year} pages was (again) {kind}." for year in range(1800, 1840) for noun in
         ("house", "book", "sea") for kind in ("read", "lost")]  # fmt: skip
TOKENIZER = XLNetTokenizer.train(LINES, 90, lower=False)
VOCAB = TOKENIZER.vocab_size
SMALL = dict(vocab_size=VOCAB, d_model=16, n_layer=3, n_head=4, d_inner=20, mem_len=7, dropout=0.25)
LENGTHS = {"tgt_len": 6, "reuse_len": 3}


def convert_job(**values):
    given = {"from": None, "to": None, "tokenizer_from": None, "checkpoint": None, "pairs": False}
    others = {key: values[key] for key in ("model", "pairs") if key in values}
    texts = {key: value if value is None else str(value) for key, value in values.items() if key not in others}
    return parse_config(ConvertJob, given | {"model": {}} | texts | others)


def import_run(source, run_dir, **values):
    """Import a checkpoint as a run with short segments, and return its directory."""
    model = LENGTHS | values.pop("model", {})
    convert(convert_job(**{"from": source}, run=run_dir, model=model, **values))
    return run_dir


def refusal(*args, **values):
    """The message with which an import is refused."""
    with pytest.raises(UserError) as caught:
        import_run(*args, **values)
    return str(caught.value)


def hugging_face_model(kind=XLNetLMHeadModel, **changes):
    """Hugging Face's model, with weights large enough for every one of them to matter."""
    model = kind(XLNetConfig(**(SMALL | changes))).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, float("layer_norm.weight" in name), 0.4)
    return model


def save_folder(model, folder, safe=True):
    """Save Hugging Face's folder, with a vocabulary."""
    model.save_pretrained(folder, safe_serialization=safe)
    (folder / "spiece.model").write_bytes(TOKENIZER.model)
    return folder


def edit_config(folder, name="config.json", **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


# ------------------------------------------------------------------------------------------ TensorFlow's bundles


def authors_tensors(model):
    """The authors' names and arrays of a Hugging Face model."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    tensors = {
        "model/transformer/word_embedding/lookup_table": state["transformer.word_embedding.weight"],
        "model/transformer/mask_emb/mask_emb": state["transformer.mask_emb"],
        "model/lm_loss/bias": state["lm_loss.bias"],
    }
    layers = range(model.config.n_layer)
    for name in ("r_w_bias", "r_r_bias", "r_s_bias", "seg_embed"):
        stacked = [state[f"transformer.layer.{l}.rel_attn.{name}"] for l in layers]
        tensors[f"model/transformer/{name}"] = np.stack(stacked)
    for l in layers:
        theirs, ours = f"transformer.layer.{l}", f"model/transformer/layer_{l}"
        for name in "qkvor":
            tensors[f"{ours}/rel_attn/{name}/kernel"] = state[f"{theirs}.rel_attn.{name}"]
        for name in ("layer_1", "layer_2"):
            tensors[f"{ours}/ff/{name}/kernel"] = state[f"{theirs}.ff.{name}.weight"].T
            tensors[f"{ours}/ff/{name}/bias"] = state[f"{theirs}.ff.{name}.bias"]
        for name in ("rel_attn", "ff"):
            tensors[f"{ours}/{name}/LayerNorm/gamma"] = state[f"{theirs}.{name}.layer_norm.weight"]
            tensors[f"{ours}/{name}/LayerNorm/beta"] = state[f"{theirs}.{name}.layer_norm.bias"]
    return tensors


def authors_config(model, **changes):
    keys = ("n_layer", "d_model", "n_head", "d_head", "d_inner")
    values = {key: getattr(model.config, key) for key in keys}
    return values | {"n_token": model.config.vocab_size, "ff_activation": "gelu", "untie_r": True} | changes


def save_checkpoint(model, folder, changes=None, config=None, **options):
    """Save the authors' checkpoint of a model; return its folder.

    changes: tensors that it has besides; None: that it lacks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = authors_tensors(model) | (changes or {})
    write_bundle(folder / "xlnet_model.ckpt", {k: v for k, v in tensors.items() if v is not None}, **options)
    (folder / "xlnet_config.json").write_text(json.dumps(authors_config(model, **(config or {}))))
    (folder / "spiece.model").write_bytes(TOKENIZER.model)
    return folder


def crc32c(data):
    """The plain definition, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes(out + bytes([number]))


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def block(entries, restart_every=4):
    """A block of a LevelDB table: keys share what they begin with, but for those at restarts."""
    out, restarts, last = bytearray(), [], b""
    for number, (key, value) in enumerate(entries):
        shared = 0
        if number % restart_every == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(last), len(key)) and last[shared] == key[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    return (
        bytes(out) + b"".join(struct.pack("<I", at) for at in restarts or [0]) + struct.pack("<I", len(restarts) or 1)
    )


def table(entries, compression=0, per_block=7):
    """A LevelDB table of sorted entries."""
    out = bytearray()

    def append(content):
        start = len(out)
        trailer = bytes([compression])
        out.extend(content + trailer + struct.pack("<I", masked(content + trailer)))
        return varint(start) + varint(len(content))

    handles = []
    for start in range(0, len(entries), per_block):
        part = entries[start : start + per_block]
        handles.append((part[-1][0], append(block(part))))
    footer = append(block([])) + append(block(handles))
    return bytes(out) + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


DTYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}


def write_bundle(prefix, tensors, shards=1, compression=0, edit_entry=lambda name, message: message):
    """Write a tensor bundle as TensorFlow does."""
    contents = [bytearray() for _ in range(shards)]
    entries = [(b"", field(1, shards) + field(3, field(1, 1)))]
    for number, (name, value) in enumerate(sorted(tensors.items())):
        value = np.asarray(value, order="C")
        data = value.tobytes()
        shard = number % shards
        dims = b"".join(field(2, field(1, size)) for size in value.shape)
        message = field(1, DTYPES[value.dtype.name]) + field(2, dims) + field(3, shard)
        message += field(4, len(contents[shard])) + field(5, len(data)) + varint(6 << 3 | 5)
        message += struct.pack("<I", masked(data))
        contents[shard] += data
        entries.append((name.encode(), edit_entry(name, message)))
    for number, content in enumerate(contents):
        Path(f"{prefix}.data-{number:05d}-of-{shards:05d}").write_bytes(content)
    Path(f"{prefix}.index").write_bytes(table(entries, compression))
