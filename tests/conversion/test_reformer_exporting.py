"""Exported Reformers give the same numbers and tokens in transformers 4 and 5; the model needs no code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, ReformerModelWithLMHead

from tests.batches import batch
from tests.conversion.reformer_models import LENGTH, SEED, TOKENIZER, draw_tokens, hash_as_transformers, save_run
from tests.conversion.third_party import assert_same, load_weights
from tests.conversion.xlnet_models import TOKENIZER as XLNET_TOKENIZER
from tests.conversion.xlnet_models import convert_job
from txl_dist.checkpoint.format import latest
from txl_dist.conversion.reformer.exporting import AS_PUBLISHED, FORGOTTEN_BIASES, MORE_AXES
from txl_dist.convert import convert
from txl_dist.data import tokenizers
from txl_dist.errors import ConfigError
from txl_dist.models.reformer import ReformerConfig
from txl_dist.runs.load import load_model

torch.set_num_threads(1)

CONF = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[2] / "conf/model/reformer.yaml"))
SMALL = {"n_layer": 3, "d_model": 32, "n_head": 2, "d_head": 8, "d_inner": 40, "tgt_len": LENGTH, "lsh": "published"}
SMALL |= {"axial_shape": [8, 8], "axial_widths": [12, 20], "lsh_chunk_len": 8, "local_chunk_len": 8, "n_buckets": [8]}
OTHERS = {"dropout": 0.25, "dropatt": 0.125, "dropatt_lsh": 0.5, "init_std": 0.03, "axial_init_std": 0.5}
OTHERS |= {"layer_norm_eps": 1e-6, "lsh_chunks_before": 2, "local_chunks_before": 0}
WORDS = tokenizers.WordTokenizer(["<eos>", "one", "two", "<unk>", *(f"w{i}" for i in range(20))])
BYTES = tokenizers.BytesTokenizer()
CASES = {
    "published": ({"n_hashes": 3}, BYTES),
    "factors": (OTHERS | {"n_buckets": [4, 2], "n_hashes": 4, "activation": "gelu_tanh"}, TOKENIZER),
    "local": ({"attn_layers": ["local"], "lsh": "strict", "activation": "gelu_erf"}, WORDS),
    "table": ({"axial_shape": [70], "axial_widths": [32], "attn_layers": ["lsh", "lsh", "local"]}, BYTES),
    "strict": ({"lsh": "strict", "hash_draw": 3, "tgt_len": 32, "ff_chunk_len": 24}, TOKENIZER),
}
TEXTS = ["one two\n three <eos>\n", "日本語 é \U0001f600 x", ""]


@pytest.fixture(scope="module")
def cases(transformers5, tmp_path_factory):
    """For each case a folder with a run, its export and what transformers 5 computes of it."""
    parent = tmp_path_factory.mktemp("cases")
    for name, (changes, tokenizer) in CASES.items():
        case = parent / name
        save_run(case / "run", ReformerConfig(**CONF | SMALL | changes), tokenizer)
        convert(convert_job(run=case / "run", to=case / "folder"))
        save_file({"tokens": draw_tokens(tokenizer.vocab_size)}, case / "input.safetensors")
        (case / "texts.json").write_text(json.dumps(TEXTS))
    environment = os.environ | transformers5 | {"HF_HOME": str(parent / "hugging_face")}
    folders = [parent / name for name in CASES]
    command = [sys.executable, Path(__file__).with_name("exported_reformer.py"), *folders]
    done = subprocess.run(command, cwd=parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return {name: parent / name for name in CASES}


@pytest.fixture(params=CASES)
def case(request, cases):
    return cases[request.param]


@torch.no_grad()
def our_logits(case, monkeypatch):
    """The log-probabilities of our model, in float64 and by the rotations that transformers draws."""
    hash_as_transformers(monkeypatch)
    tokens = load_file(case / "input.safetensors")["tokens"]
    model = load_model(str(case / "run"))[0].double()
    fields = batch(tokens, None, torch.arange(LENGTH).expand(2, LENGTH))
    return model(fields, model.empty_memory(2))[0]


def test_all_versions_compute_our_numbers(case, monkeypatch):
    """But for hashing that is causal here; and version 5 forgets the biases."""
    expected = our_logits(case, monkeypatch)
    tokens = load_file(case / "input.safetensors")["tokens"]
    of_version_4 = ReformerModelWithLMHead.from_pretrained(case / "folder", hash_seed=SEED).double().eval()
    of_version_5 = load_file(case / "output.safetensors")
    for logits in (of_version_4(tokens).logits.detach(), of_version_5["logits"]):
        difference = (logits.log_softmax(-1) - expected).abs().max()
        assert difference > 0.1 if case.name == "strict" else difference < 1e-10
    forgotten = of_version_5["logits"] - of_version_5["as_loaded"]
    torch.testing.assert_close(forgotten, of_version_4.lm_head.bias.detach().expand_as(forgotten))
    facts = json.loads((case / "output.json").read_text())
    assert facts["unexpected"] == [] and facts["generated"] == 3


def test_the_tokenizer_is_ours(case):
    facts = json.loads((case / "output.json").read_text())
    tokenizer = tokenizers.load(case / "run" / "tokenizer")
    for text, ids, decoded in zip(TEXTS, facts["ids"], facts["decoded"], strict=True):
        expected = tokenizer.encode(text.encode(), False).tolist()
        assert ids == [tokenizer.eos, *expected] and decoded == tokenizer.decode(expected)
    assert facts["ends"] == [None if tokenizer.kind == "word" else tokenizer.eos] * 2


def test_weights_and_keys_come_back_to_the_bit(case, tmp_path):
    """The export, and what transformers 5 has saved of it, imported again."""
    before = latest(case / "run")
    for name in ("folder", "again"):
        convert(convert_job(**{"from": case / name}, run=tmp_path / name))
        after = latest(tmp_path / name)
        assert_same(load_weights(tmp_path / name), load_weights(case / "run"))
        assert after.config == before.config and after.state["imported"]["title"] == "Hugging Face's reformer"
        for path in (case / "run" / "tokenizer").iterdir():
            assert (tmp_path / name / "tokenizer" / path.name).read_bytes() == path.read_bytes()


def test_the_model_needs_no_code(case):
    kind = tokenizers.load(case / "run" / "tokenizer").kind
    assert [path.name for path in (case / "folder").glob("*.py")] == [f"tokenization_{kind}.py"]
    assert type(AutoModelForCausalLM.from_pretrained(case / "folder")) is ReformerModelWithLMHead


def test_what_is_not_carried_over_is_said(tmp_path, capsys):
    axes = {"axial_shape": [4, 4, 4], "axial_widths": [8, 8, 16]}
    expected = {
        "strict": ({"lsh": "strict"}, [AS_PUBLISHED, FORGOTTEN_BIASES]),
        "local": ({"lsh": "strict", "attn_layers": ["local"]}, [FORGOTTEN_BIASES]),
        "axes": (axes, [MORE_AXES, FORGOTTEN_BIASES]),
    }
    for name, (changes, notes) in expected.items():
        run_dir = save_run(tmp_path / name, ReformerConfig(**CONF | SMALL | changes), BYTES)
        convert(convert_job(run=run_dir, to=tmp_path / f"{name}-out"))
        assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("Note: ")] == [
            f"Note: {note}" for note in notes
        ]
        section = json.loads((tmp_path / f"{name}-out" / "config.json").read_text())["txl_dist"]
        assert section["notes"] == notes and section["lsh"] == changes.get("lsh", "published")


def test_a_tokenizer_without_code_is_refused(tmp_path):
    run_dir = save_run(tmp_path / "run", ReformerConfig(**CONF | SMALL), XLNET_TOKENIZER)
    with pytest.raises(
        ConfigError, match=r"tokenizer.name=xlnet: .* must be one of \['bytes', 'sentencepiece', 'word'\]"
    ):
        convert(convert_job(run=run_dir, to=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
