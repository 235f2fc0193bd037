"""Small valid files: a dataset and a run of each tokenizer, an export, third-party checkpoints."""

import importlib
import io
import json
import pickle
import pkgutil
import random
import re
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save

import txl_dist
from txl_dist.checkpoint.format import CheckpointWriter, latest
from txl_dist.conversion.transformer_xl.weights import hugging_face_shapes
from txl_dist.data.index import Index
from txl_dist.data.tokenizers import SentencePieceTokenizer
from txl_dist.models.transformer_xl import TransformerXL, TransformerXLConfig

from .isolate import call, command

MODEL = dict(n_layer=2, d_model=16, n_head=2, d_head=6, d_inner=20, mem_len=7, tgt_len=5, clamp_len=-1)
MODEL |= dict(same_length=False, dropout=0.0, dropatt=0.0, pre_lnorm=False, div_val=2, cutoffs=[10, 20], init_std=0.02)
WORDS = ["<eos>", "<unk>", *(f"w{i}" for i in range(48))]
TRAIN = ["data.num_lanes=2", "model.n_layer=1", "model.d_model=16", "model.n_head=2", "model.d_head=8"]
TRAIN += ["model.d_inner=16", "model.tgt_len=8", "model.mem_len=8", "train.max_steps=4", "train.stop_at=2"]
TRAIN += ["checkpoint.every=2", "train.eval_every=2", "tracking.mode=disabled", "tracking.log_every=1"]
LABELLED = {  # files of examples, and how they are prepared
    "labelled.csv": ["corpus=examples", "corpus.text_pair=pair"],
    "labelled.tsv": ["corpus=examples", "corpus.kind=scores"],
    "labelled.jsonl": ["corpus=examples"],
    "questions.json": ["corpus=squad"],
}
TOKENIZERS = ("bytes", "word", "sentencepiece")


def warm_up() -> None:
    """Import what all commands need, once; no thread is started, so that a fork holds all of the process."""
    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(txl_dist.__path__, "txl_dist."):
        if "conversion.hub." not in module.name:  # those are copied, and import transformers
            importlib.import_module(module.name)


def make(folder: Path) -> None:
    """Make all specimens: folders of data and runs by tokenizer, an export, and third-party checkpoints."""
    rng = random.Random(1)
    text = "".join(" ".join(rng.choices(WORDS[2:], k=rng.randint(1, 9))) + "\n" for _ in range(250))
    (folder / "book.txt").write_text(text)
    for name in TOKENIZERS:
        data = f"data.dir={folder / name}"
        run = f"run.dir={folder / f'run-{name}'}"
        size = ["tokenizer.vocab_size=305"] if name == "sentencepiece" else []
        cut = ["data.sample_tokens=64", "data.shard_samples=8", "corpus.valid_share=0.1", "corpus.test_share=0.1"]
        prepare = ["corpus=text", f"corpus.path={folder / 'book.txt'}", f"tokenizer={name}", "workers=1", data]
        done(folder, command("txl_dist.prepare", *prepare, *size, *cut))
        train = command("txl_dist.train", *TRAIN, data, run)
        done(folder, train if name == "bytes" else partial(untrained, folder, name))
    done(folder, command("txl_dist.convert", f"run={folder / 'run-word'}", f"to={folder / 'export'}"))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "given.model").write_bytes((folder / "sentencepiece" / "tokenizer" / "sentencepiece.model").read_bytes())
    SentencePieceTokenizer.open(folder / "given.model")
    third_party(folder)
    labelled(folder)


def labelled(folder: Path) -> None:
    """Make the files of examples, and a dataset of each."""
    rows = [{"sentence": f"w{n} w2", "pair": f"w3 w{n}", "label": n % 3} for n in range(60)]
    table = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    (folder / "labelled.csv").write_text("".join(",".join(f'"{value}"' for value in row) + "\n" for row in table))
    (folder / "labelled.tsv").write_text("".join("\t".join(row) + "\n" for row in table))
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    articles = []
    for number in range(30):
        question = {"id": f"q{number}", "question": "w1?", "answers": [{"text": "w2", "answer_start": 3}]}
        articles.append({"title": "a", "paragraphs": [{"context": f"w1 w2 w{number}", "qas": [question]}]})
    (folder / "questions.json").write_text(json.dumps({"data": articles}))
    for name, corpus in LABELLED.items():
        path = f"corpus.path={folder / name}"
        data = f"data.dir={folder / f'data-{name}'}"
        done(folder, command("txl_dist.prepare", *corpus, path, "tokenizer=word", "workers=1", data))


def untrained(folder: Path, tokenizer: str) -> None:
    """Make a run of other data from the run with bytes, without training."""
    index = Index.open(str(folder / tokenizer))
    like = latest(folder / "run-bytes")
    run = folder / f"run-{tokenizer}"
    config = like.config | {"data": like.config["data"] | {"dir": str(folder / tokenizer)}}
    model = TransformerXL(TransformerXLConfig(**config["model"]), index.vocab_size)
    writer = CheckpointWriter(str(run), like.step, rank=0)
    writer.add("weights", dict(model.named_parameters()))
    for kind in ("optimizer", "memory"):
        writer.add(kind, like.tensors(kind))
    facts = {"fingerprint": index.fingerprint, "vocab_size": index.vocab_size, "tokenizer": index.tokenizer_files}
    writer.commit(writer.files, like.state, config, facts)
    index.tokenizer().save(run / "tokenizer")


def done(folder: Path, run) -> None:
    outcome = call(run, folder / "log")
    if outcome.code:
        raise SystemExit(f"a specimen cannot be made:\n{outcome.output}")


def third_party(folder: Path) -> None:
    """Make Hugging Face's folder (both formats, parts), the authors' and NVIDIA's files, a pickled vocabulary."""
    config = TransformerXLConfig(name="transformer_xl", tie_weights=True, tie_projections=True, **MODEL)
    torch.manual_seed(1)
    tensors = {name: torch.randn(shape) for name, shape in hugging_face_shapes(config, len(WORDS)).items()}
    for name in [name for name in tensors if name.startswith("crit.out_") and not name.endswith("bias")]:
        del tensors[name]
    hub = MODEL | {"model_type": "transfo-xl", "vocab_size": len(WORDS), "d_embed": 16, "tie_projs": [True] * 3}
    for kind in ("safe", "bin", "parts"):
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text(json.dumps(hub))
        (folder / kind / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "safe" / "model.safetensors").write_bytes(save(tensors))
    torch.save(tensors, folder / "bin" / "pytorch_model.bin")
    (folder / "parts" / "one.safetensors").write_bytes(save(tensors))
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "one.safetensors")}
    (folder / "parts" / "model.safetensors.index.json").write_text(json.dumps(index))
    authors = {re.sub(r"layers\.\d+\.dec_attn\.(r_[wr]_bias)", r"\1", name): tensor for name, tensor in tensors.items()}
    authors = {name.removeprefix("transformer."): tensor for name, tensor in authors.items()}
    nvidia_config = MODEL | {"n_token": len(WORDS), "tie_weight": True, "tie_projs": [True] * 3, "d_embed": 16}
    words = {"idx2sym": WORDS, "sym2idx": {word: i for i, word in enumerate(WORDS)}, "lower_case": False}
    nvidia = {"model_config": nvidia_config, "model_state": authors, "epoch": 1, "optimizer": {"state": {0: [1.5]}}}
    for name, content in {"authors": {"model": authors, "step": 3}, "nvidia": nvidia}.items():
        for new in (True, False):
            stream = io.BytesIO()
            torch.save(content, stream, _use_new_zipfile_serialization=new)
            (folder / f"{name}-{'zip' if new else 'old'}.pt").write_bytes(stream.getvalue())
    (folder / "vocab.pkl").write_bytes(pickle.dumps(words, protocol=2))
