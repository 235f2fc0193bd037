"""run.init_from: a new run begins with the weights of another one, and with nothing else of it."""

import json
import shutil

import pytest
import torch
from transformers import XLNetForSequenceClassification, XLNetModel

from tests.conversion.third_party import SMALL, hugging_face_model, save_folder
from tests.conversion.xlnet_models import LINES, TOKENIZER, save_checkpoint
from tests.conversion.xlnet_models import hugging_face_model as hugging_face_xlnet
from tests.conversion.xlnet_models import save_folder as save_xlnet_folder
from tests.examples import write_labels
from txl_dist.checkpoint.format import latest, write_manifest

STILL = ["optimizer.lr=1e-30", "train.max_steps=1"]  # after a step the weights are what they were
SPLITS = {
    "one": (None, []),
    "ZeRO 0": (None, ["engine.zero_stage=0"]),
    "bf16": (None, ["engine.precision=bf16"]),
    "ZeRO 2": (2, ["engine.zero_stage=2", "engine.gradient_accumulation=2"]),
    "ZeRO 3, bf16": (2, ["engine.zero_stage=3", "engine.precision=bf16"]),
    "pipeline": (2, ["engine.pipeline_stages=2"]),
}


def same_weights(one, other):
    one, other = (latest(run_dir).tensors("weights") for run_dir in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def first_loss(run_dir):
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])["train/loss"]


@pytest.fixture(scope="module")
def trained(run, small, tmp_path_factory):
    """A run of 20 steps, and its last loss."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    run("txl_dist.train", *small, f"run.dir={run_dir}")
    return run_dir


@pytest.mark.parametrize("split", [pytest.param(name, marks=[pytest.mark.slow] * (name != "one")) for name in SPLITS])
def test_a_run_begins_with_the_weights_of_another(split, run, small, trained, tmp_path):
    """To the bit in fp32 copies, and the first step computes with them. Optimizer and memory are new."""
    processes, options = SPLITS[split]
    command = [*small, *options, f"run.dir={tmp_path / 'run'}", f"run.init_from={trained}", "run.seed=7", *STILL]
    done = run("txl_dist.train", *command, processes=processes)
    assert same_weights(trained, tmp_path / "run")
    assert f"starting with the weights of step 20 of {trained}" in done.stdout
    assert latest(tmp_path / "run").step == 1
    assert latest(tmp_path / "run").state["optimizer"]["state"].get("step", 1.0) == 1.0
    random = tmp_path / "random"
    run("txl_dist.train", *small, f"run.dir={random}", "run.seed=7", *STILL)
    # After 20 steps the text is far from new.
    assert first_loss(tmp_path / "run") < first_loss(random) - 1


def test_resuming_ignores_it(run, small, trained, tmp_path):
    """Even where it is not there any more; and a run that was started without it may be given it."""
    origin = shutil.copytree(trained, tmp_path / "origin")
    command = [*small, f"run.dir={tmp_path / 'run'}", f"run.init_from={origin}", "train.max_steps=20"]
    run("txl_dist.train", *command, "train.stop_at=10")
    shutil.rmtree(origin)
    done = run("txl_dist.train", *command)
    assert "resuming from step 10" in done.stdout and latest(tmp_path / "run").step == 20
    run("txl_dist.train", *small, f"run.dir={tmp_path / 'one'}", f"run.init_from={trained}", "train.max_steps=20")
    assert same_weights(tmp_path / "one", tmp_path / "run")


def test_a_checkpoint_of_an_earlier_version_resumes(run, small, trained, tmp_path):
    """Its config does not have the key."""
    run_dir = shutil.copytree(trained, tmp_path / "run")
    checkpoint = latest(run_dir)
    manifest = json.loads((checkpoint.path / "checkpoint.json").read_text())
    del manifest["sha256"], manifest["config"]["run"]["init_from"]
    write_manifest(checkpoint.path, manifest)
    done = run("txl_dist.train", *small, f"run.dir={run_dir}", "train.max_steps=22", f"run.init_from={tmp_path}/none")
    assert "resuming from step 20" in done.stdout


def test_an_exported_folder_and_an_imported_run_are_origins_too(run, small, trained, tmp_path):
    run("txl_dist.convert", f"run={trained}", f"to={tmp_path / 'folder'}")
    run("txl_dist.convert", f"from={tmp_path / 'folder'}", f"run={tmp_path / 'imported'}")
    for origin in (tmp_path / "folder", tmp_path / "imported"):
        run_dir = tmp_path / f"from-{origin.name}"
        run("txl_dist.train", *small, f"run.dir={run_dir}", f"run.init_from={origin}", *STILL)
        assert same_weights(trained, run_dir)


@pytest.mark.parametrize(
    "options, messages",
    [
        (["model.d_inner=48"], ["model.d_inner=48: the model of run.init_from=", "has 64; give that"]),
        (["model.n_layer=3", "model.d_model=48"], ["model.n_layer=3", "has 2", "model.d_model=48", "has 32"]),
        (["model.pre_lnorm=true"], ["model.pre_lnorm=True: the model of run.init_from="]),
    ],
)
def test_another_model_is_refused(options, messages, run, small, trained, tmp_path):
    """From a run and from a folder alike, with all that differs; and before anything is written."""
    run("txl_dist.convert", f"run={trained}", f"to={tmp_path / 'folder'}")
    for origin in (trained, tmp_path / "folder"):
        command = [*small, f"run.dir={tmp_path / 'run'}", f"run.init_from={origin}", *options]
        done = run("txl_dist.train", *command, expect=2)
        assert all(message in done.stderr for message in messages) and "Traceback" not in done.stderr
        assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_may_change_and_how_weights_are_drawn_may_differ(run, small, trained, tmp_path):
    other = ["model.mem_len=8", "model.tgt_len=12", "model.dropout=0.2", "model.init_std=0.5", "optimizer=lamb"]
    command = [*small, *other, "engine.zero_stage=0", f"run.dir={tmp_path / 'run'}", f"run.init_from={trained}"]
    run("txl_dist.train", *command, *STILL)
    assert same_weights(trained, tmp_path / "run")


def test_another_tokenizer_is_refused(run, small, trained, corpus, tmp_path):
    """Of another size, and of the same size with other words."""
    command = ["corpus=text", f"corpus.path={corpus}", "tokenizer=word", "tokenizer.vocab_size=40"]
    for name in ("one", "other"):
        words = "\n".join(["<eos>", "<unk>", "the", *(f"{name}{i}" for i in range(20))])
        (tmp_path / f"{name}.txt").write_text(words + "\n")
        given = [*command, f"tokenizer.vocab={tmp_path / name}.txt", "corpus.valid_share=0.1", "corpus.test_share=0.1"]
        run("txl_dist.prepare", *given, f"data.dir={tmp_path / name}")
    here = [*small, f"data.dir={tmp_path / 'one'}"]
    done = run("txl_dist.train", *here, f"run.dir={tmp_path / 'a'}", f"run.init_from={trained}", expect=2)
    assert "its vocabulary has 23 tokens" in done.stderr and "257" in done.stderr
    run("txl_dist.train", *here, f"run.dir={tmp_path / 'a'}", "train.max_steps=2")
    there = [*small, f"data.dir={tmp_path / 'other'}", f"run.dir={tmp_path / 'b'}", f"run.init_from={tmp_path / 'a'}"]
    done = run("txl_dist.train", *there, expect=2)
    assert f"data.dir={tmp_path / 'other'}: its tokenizer is not that of run.init_from=" in done.stderr
    run("txl_dist.train", *here, f"run.dir={tmp_path / 'b'}", f"run.init_from={tmp_path / 'a'}", "train.max_steps=2")


def test_what_is_no_origin_is_refused(run, small, trained, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.txt").write_text("no checkpoint")
    folder = save_folder(hugging_face_model(**SMALL), tmp_path / "hf")
    cases = {
        tmp_path / "none": "there is no such run directory, folder or file",
        tmp_path / "empty": "is neither a run directory with a checkpoint nor a third-party checkpoint",
        tmp_path / "words.txt": "words.txt: cannot be read",
        folder: "model.d_model=32: the model of run.init_from=",
    }
    for origin, message in cases.items():
        done = run("txl_dist.train", *small, f"run.dir={tmp_path / 'run'}", f"run.init_from={origin}", expect=2)
        assert message in done.stderr and str(origin) in done.stderr and "Traceback" not in done.stderr
    damaged = shutil.copytree(trained, tmp_path / "damaged")
    for path in damaged.glob("checkpoints/*/weights-*"):
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    done = run("txl_dist.train", *small, f"run.dir={tmp_path / 'run'}", f"run.init_from={damaged}", expect=2)
    assert "SHA-256 differs" in done.stderr


def test_xlnet_begins_with_the_weights_of_third_parties(run, tmp_path):
    """With those of Hugging Face and of the authors; what the folder states of the activation must be what is given."""
    model = hugging_face_xlnet()
    folder = save_xlnet_folder(model, tmp_path / "hf")
    authors = save_checkpoint(model, tmp_path / "tf") / "xlnet_model.ckpt"
    (tmp_path / "text.txt").write_text("\n".join(LINES * 20))
    text = ["corpus=text", f"corpus.path={tmp_path / 'text.txt'}", "corpus.valid_share=0.1", "corpus.test_share=0.1"]
    given = ["tokenizer=xlnet", f"tokenizer.model={folder / 'spiece.model'}", f"data.dir={tmp_path / 'data'}"]
    run("txl_dist.prepare", *text, *given)
    sizes = ["model=xlnet", "model.n_layer=3", "model.d_model=16", "model.n_head=4", "model.d_head=4"]
    sizes += ["model.d_inner=20", "model.tgt_len=8", "model.mem_len=8", "model.reuse_len=4", "data.num_lanes=4"]
    command = [*sizes, f"data.dir={tmp_path / 'data'}", "tracking.mode=disabled", "optimizer.lr=1e-30"]
    command += ["train.max_steps=1", "schedule.warmup_steps=0"]
    run("txl_dist.convert", f"from={folder}", f"run={tmp_path / 'imported'}")
    for name, origin, activation in (("a", authors, "gelu_tanh"), ("h", folder, "gelu_erf")):
        options = [*command, f"run.dir={tmp_path / name}", f"run.init_from={origin}"]
        run("txl_dist.train", *options, f"model.activation={activation}")
        assert same_weights(tmp_path / "imported", tmp_path / name)
    done = run("txl_dist.train", *command, f"run.dir={tmp_path / 'x'}", f"run.init_from={folder}", expect=2)
    assert "model.activation=gelu_tanh: the model of run.init_from=" in done.stderr and "gelu_erf" in done.stderr


@pytest.fixture(scope="module")
def labelled(run, tmp_path_factory):
    """A few labelled texts, prepared with the vocabulary of XLNet's made-up folders."""
    folder = tmp_path_factory.mktemp("labelled")
    (folder / "spiece.model").write_bytes(TOKENIZER.model)
    corpus = ["corpus=examples", *write_labels(folder, (8, 4, 4), longest=4)]
    vocabulary = ["tokenizer=xlnet", f"tokenizer.model={folder / 'spiece.model'}"]
    run("txl_dist.prepare", *corpus, *vocabulary, f"data.dir={folder / 'data'}")
    return folder / "data"


def fine_tuning(origin, run_dir, data):
    """Overrides of a run that learns nothing."""
    command = ["+experiment=sst2", f"run.init_from={origin}", f"run.dir={run_dir}", f"data.dir={data}"]
    command += ["model.tgt_len=16", "data.num_lanes=4", "tracking.mode=disabled", "optimizer.lr=1e-30"]
    return [*command, "train.max_steps=2", "train.eval_every=1", "checkpoint.every=1", "schedule.warmup_steps=0"]


@pytest.mark.parametrize("kind", [XLNetModel, XLNetForSequenceClassification])
def test_a_task_begins_with_any_xlnet(kind, run, labelled, tmp_path):
    """With model=init_from the folder gives all sizes; the run goes on when it is gone."""
    folder = save_xlnet_folder(hugging_face_xlnet(kind), tmp_path / "hf")
    expected = XLNetModel.from_pretrained(folder).state_dict()["layer.2.ff.layer_1.weight"]
    command = fine_tuning(folder, tmp_path / "run", labelled)
    done = run("txl_dist.train", *command, "model.reuse_len=17", expect=2)
    assert done.stderr.count("model.reuse_len=17: is a part of a segment") == 1
    done = run("txl_dist.train", *command, "model.reuse_len=8", "train.stop_at=1")
    assert "starting with the weights of Hugging Face's xlnet, without" in done.stdout
    assert ("without its logits_proj, sequence_summary" in done.stdout) == (kind is not XLNetModel)
    model = latest(tmp_path / "run").config["model"]
    sizes = {"name": "xlnet", "n_layer": 3, "d_model": 16, "d_inner": 20, "mem_len": 7, "tgt_len": 16, "dropout": 0.25}
    assert {key: model[key] for key in sizes} == sizes
    shutil.rmtree(folder)
    done = run("txl_dist.train", *command, "model.reuse_len=8")
    assert "resuming from step 1" in done.stdout and latest(tmp_path / "run").step == 2
    assert torch.equal(latest(tmp_path / "run").tensors("weights")["layers.2.feed_forward.inner.weight"], expected)


def test_an_imported_task_keeps_its_head_and_gives_none(run, labelled, tmp_path):
    folder = save_xlnet_folder(hugging_face_xlnet(XLNetForSequenceClassification), tmp_path / "hf")
    run("txl_dist.convert", f"from={folder}", f"run={tmp_path / 'imported'}")
    done = run("txl_dist.evaluate", f"run={tmp_path / 'imported'}", f"data_dir={labelled}", expect=2)
    assert "holds examples of kind='labels' labels=['bad', 'good', 'so-so']" in done.stderr
    assert "was imported for those of kind='labels' labels=['LABEL_0', 'LABEL_1']" in done.stderr
    command = fine_tuning(tmp_path / "imported", tmp_path / "run", labelled)
    run("txl_dist.train", *command, "model.reuse_len=8")
    heads = [latest(tmp_path / name).tensors("weights")["task_head.summary.weight"] for name in ("imported", "run")]
    assert heads[0].std() > 0.3 and heads[1].std() < 0.03  # drawn as init_std says
    run("txl_dist.convert", f"run={tmp_path / 'run'}", f"to={tmp_path / 'folder'}")
    run("txl_dist.convert", f"from={tmp_path / 'folder'}", f"run={tmp_path / 'again'}")
    losses = []
    for name in ("run", "again"):
        done = run("txl_dist.evaluate", f"run={tmp_path / name}", f"data_dir={labelled}", "format=json")
        losses.append(json.loads(done.stdout)["loss"])
    assert losses[0] == losses[1]
