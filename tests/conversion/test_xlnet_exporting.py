"""Exported XLNet folders give the same numbers and tokens in transformers 4 and 5, without any code of ours."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers as hugging_face_tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, XLNetLMHeadModel, XLNetTokenizer, XLNetTokenizerFast

from tests.batches import batch
from tests.conversion.third_party import assert_same, load_weights
from tests.conversion.xlnet_models import (
    LINES,
    PUBLISHED,
    SHARED,
    TOKENIZER,
    VOCAB,
    convert_job,
    hugging_face_model,
    import_run,
    needs_published,
    save_folder,
)
from txl_dist.checkpoint.format import CheckpointWriter, latest
from txl_dist.conversion.xlnet.tokenizer_json import tokenizer_json
from txl_dist.convert import convert
from txl_dist.data.tokenizers import BytesTokenizer
from txl_dist.data.tokenizers import XLNetTokenizer as OurTokenizer
from txl_dist.errors import ConfigError
from txl_dist.runs.load import load_model

TEXTS = [*LINES[:20], "", " ", "``quoted'' 'single'", "Café naïve ﬁne ½ Å", "3,000, 12,5, and (x)."]
TEXTS += [
    "\u2581 a\u2581\u2581b  \t</x> \r\n日本語 é e\u0301 \U0001f600 x",
    "a\u2028d\u3000e\xa0 g",
    "  two  spaces  ",
]
# Control characters that count as white space; transformers 5 makes its own normalisation, in which they are nothing.
CONTROLS = ["a\x0bb\x85c\x1cd"]
LONG = 6  # tokens: the first tgt_len of a document


def arguments_of(tokens):
    """What Hugging Face's model is called with, to predict the token after each from those before it and itself."""
    length = tokens.size(1) + 1
    return {
        "input_ids": torch.cat([tokens, torch.zeros_like(tokens[:, :1])], dim=1),
        "perm_mask": torch.ones(length, length).triu().expand(len(tokens), -1, -1).contiguous(),
        "target_mapping": torch.eye(length)[1:].expand(len(tokens), -1, -1).contiguous(),
    }


@pytest.fixture(scope="module", params=["gelu", "gelu_new", "relu"])
def case(request, transformers5, tmp_path_factory):
    """A folder with a run, its export and what transformers 5 computes of it."""
    folder = tmp_path_factory.mktemp("case")
    import_run(save_folder(hugging_face_model(ff_activation=request.param), folder / "hf"), folder / "run")
    convert(convert_job(run=folder / "run", to=folder / "folder"))
    tokens = torch.randint(VOCAB, (2, LONG), generator=torch.Generator().manual_seed(3))
    save_file(arguments_of(tokens), folder / "input.safetensors")
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    environment = os.environ | transformers5 | {"HF_HOME": str(folder / "hugging_face")}
    command = [sys.executable, Path(__file__).with_name("exported_xlnet.py"), folder]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def test_all_versions_compute_our_numbers(case):
    arguments = load_file(case / "input.safetensors")
    tokens = arguments["input_ids"][:, :-1]
    model, _ = load_model(str(case / "run"))
    with torch.no_grad():
        lookback = torch.arange(LONG).expand(2, LONG)
        expected, _ = model(batch(tokens, None, lookback), model.empty_memory(2))
        of_version_4 = XLNetLMHeadModel.from_pretrained(case / "folder").eval()(**arguments).logits
    of_version_5 = load_file(case / "output.safetensors")["logits"]
    torch.testing.assert_close(of_version_4.log_softmax(-1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_version_5.log_softmax(-1), expected, rtol=1e-5, atol=1e-5)
    assert json.loads((case / "output.json").read_text())["unexpected"] == []


def test_the_folder_holds_weights_and_no_code(case):
    names = {path.name for path in (case / "folder").iterdir()}
    assert names == {"config.json", "model.safetensors", "spiece.model", "tokenizer.json", "tokenizer_config.json"}
    assert type(AutoModelForCausalLM.from_pretrained(case / "folder")) is XLNetLMHeadModel
    reference = XLNetLMHeadModel.from_pretrained(case / "hf").state_dict()
    assert_same(XLNetLMHeadModel.from_pretrained(case / "folder").state_dict(), reference)


def test_all_tokenizers_are_ours(case):
    expected = [TOKENIZER.encode(text.encode(), False).tolist() for text in TEXTS + CONTROLS]
    folder = case / "folder"
    of_version_4 = AutoTokenizer.from_pretrained(folder)
    assert type(of_version_4) is XLNetTokenizerFast
    for tokenizer in (of_version_4, XLNetTokenizerFast.from_pretrained(folder), XLNetTokenizer.from_pretrained(folder)):
        assert [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS + CONTROLS] == expected
    facts = json.loads((case / "output.json").read_text())
    assert facts["ids"] == expected[: len(TEXTS)]
    one, two = (TOKENIZER.encode(text, False).tolist() for text in (b"one", b"two"))
    pair = of_version_4("one", "two")
    assert facts["pair"] == [pair.input_ids, pair.token_type_ids]
    assert facts["pair"][0] == [*one, 4, *two, 4, 3]
    assert facts["pair"][1] == [0] * (len(one) + 1) + [1] * (len(two) + 1) + [2]
    assert facts["specials"] == {"<sep>": 4, "<cls>": 3, "<eod>": 7, "<eop>": 8, "<mask>": 6}
    assert facts["decoded"] == "one two"


def test_weights_and_lengths_come_back_to_the_bit(case, tmp_path):
    """The export, and what transformers 5 has saved of it, imported again."""
    before = latest(case / "run")
    for name in ("folder", "again"):
        folder = shutil.copytree(case / name, tmp_path / name)
        if name == "again":  # transformers 5 does not save spiece.model
            (folder / "spiece.model").write_bytes(TOKENIZER.model)
        convert(convert_job(**{"from": folder}, run=tmp_path / f"run-{name}"))
        assert_same(load_weights(tmp_path / f"run-{name}"), load_weights(case / "run"))
        assert latest(tmp_path / f"run-{name}").config == before.config
        for path in (case / "run" / "tokenizer").iterdir():
            assert (tmp_path / f"run-{name}" / "tokenizer" / path.name).read_bytes() == path.read_bytes()


def test_every_key_of_the_model_comes_back(tmp_path):
    changes = {"clamp_len": 5, "layer_norm_eps": 1e-6, "initializer_range": 0.3, "dropout": 0.0}
    import_run(save_folder(hugging_face_model(**changes), tmp_path / "hf"), tmp_path / "first")
    # dropatt, which Hugging Face has not, differs: as in a run that was trained here.
    first = latest(tmp_path / "first")
    model = first.config["model"] | {"dropatt": 0.125, "mem_len": 0, "tgt_len": 11, "reuse_len": 5}
    writer = CheckpointWriter(str(tmp_path / "run"), step=0, rank=0)
    writer.add("weights", first.tensors("weights"))
    writer.commit(writer.files, first.state, first.config | {"model": model}, first.data)
    shutil.copytree(tmp_path / "first" / "tokenizer", tmp_path / "run" / "tokenizer")
    convert(convert_job(run=tmp_path / "run", to=tmp_path / "folder"))
    convert(convert_job(**{"from": tmp_path / "folder"}, run=tmp_path / "again"))
    assert latest(tmp_path / "again").config["model"] == model
    config = XLNetLMHeadModel.from_pretrained(tmp_path / "folder").config
    assert (config.mem_len, config.use_mems_eval, config.reuse_len) == (None, False, None)


def test_what_transformers_does_not_have_is_refused(tmp_path):
    folder = save_folder(hugging_face_model(), tmp_path / "hf")
    run_dir = import_run(folder, tmp_path / "run")
    shutil.rmtree(run_dir / "tokenizer")
    BytesTokenizer().save(run_dir / "tokenizer")
    checkpoint = latest(run_dir)
    writer = CheckpointWriter(str(run_dir), step=0, rank=0)
    writer.add("weights", checkpoint.tensors("weights"))
    config = checkpoint.config | {"model": checkpoint.config["model"] | {"d_head": 5}}
    writer.commit(writer.files, checkpoint.state, config, checkpoint.data)
    with pytest.raises(ConfigError) as caught:
        convert(convert_job(run=run_dir, to=tmp_path / "out"))
    assert "model.d_head=5" in str(caught.value) and "tokenizer.name=bytes" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_lowers_is_exported_so(tmp_path):
    folder = save_folder(hugging_face_model(), tmp_path / "hf")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    convert(convert_job(run=import_run(folder, tmp_path / "run"), to=tmp_path / "out"))
    ours = OurTokenizer(TOKENIZER.model, lower=True)
    for kind in (XLNetTokenizer, XLNetTokenizerFast):
        theirs = kind.from_pretrained(tmp_path / "out")
        assert [theirs(text, add_special_tokens=False).input_ids for text in TEXTS] == [
            ours.encode(text.encode(), False).tolist() for text in TEXTS
        ]


@needs_published
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gutenberg/1342.txt", "gutenberg/2701.txt", "shakespeare/input.txt"])
def test_the_published_vocabulary_reads_a_book_as_sentencepiece_does(name):
    """Every line, and with NUMBER_AND_COMMA as near as the format comes to the authors' rule: here they are equal."""
    ours = OurTokenizer(PUBLISHED.read_bytes())
    theirs = hugging_face_tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ours.model, lower=False)))
    lines = (SHARED / name).read_text().split("\n")
    encoded = theirs.encode_batch(lines, add_special_tokens=False)
    different = [
        line
        for line, encoding in zip(lines, encoded, strict=True)
        if encoding.ids != ours.encode(line.encode(), False).tolist()
    ]
    assert len(lines) > 10_000 and different == []


@needs_published
def test_the_published_vocabulary_as_transformers_4_converts_it():
    """The same pieces, scores, special tokens and template; only the normalisation is more faithful here."""
    theirs = json.loads(XLNetTokenizerFast(str(PUBLISHED))._tokenizer.to_str())
    own = json.dumps(tokenizer_json(PUBLISHED.read_bytes(), lower=False))
    ours = json.loads(hugging_face_tokenizers.Tokenizer.from_str(own).to_str())
    for key in ("added_tokens", "pre_tokenizer", "post_processor", "decoder"):
        assert ours[key] == theirs[key]
    assert ours["model"].keys() == theirs["model"].keys() and ours["model"]["unk_id"] == theirs["model"]["unk_id"]
    for (piece, score), (their_piece, their_score) in zip(
        ours["model"]["vocab"], theirs["model"]["vocab"], strict=True
    ):
        assert piece == their_piece and score == pytest.approx(their_score, rel=1e-12)


def test_two_streams_agree_with_transformers_5_as_well(transformers5):
    """The comparison with transformers 4.36.2: logits, loss, gradients and memories, in both directions."""
    repo = Path(__file__).parents[2]
    paths = os.pathsep.join([str(Path(transformers5["PYTHONPATH"]).resolve()), str(repo)])
    environment = os.environ | transformers5 | {"PYTHONPATH": paths}
    asked = ["tests/models/test_xlnet.py", "-k", "agrees_with_the_reference", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *asked]
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "12 passed" in done.stdout, done.stdout + done.stderr
