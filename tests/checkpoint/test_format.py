"""Checkpoints are complete or absent, and errors name what is wrong with them."""

import json
import os

import pytest
import torch
from omegaconf import OmegaConf

from txl_dist.checkpoint.format import (
    CheckpointWriter,
    best,
    directory,
    find_checkpoint,
    latest,
    open_checkpoint,
    steps,
    write_manifest,
)
from txl_dist.checkpoint.retention import Retention
from txl_dist.cli import CONF
from txl_dist.config.schema import CheckpointConfig
from txl_dist.errors import UserError, describe_os_error
from txl_dist.models.shapes import parameter_shapes
from txl_dist.models.transformer_xl import TransformerXLConfig
from txl_dist.runs.load import load_model

NUMBERS = {"state": {"step": 7.0}, "group": {}, "loss_scaler": {}}
CONFIG = {
    "run": {"seed": 1},
    "data": {"dir": "data", "num_lanes": 2, "order": "corpus", "reset_memory": "never"},
    "model": OmegaConf.to_container(OmegaConf.load(CONF / "model/transformer_xl.yaml")),
    "optimizer": {"name": "adam"},
    "train": {"max_steps": 100},
    "engine": {"zero_stage": 1, "gradient_accumulation": 1, "offload": "none"},
}


def write(run_dir, step, valid_loss=None, value=None):
    writers = [CheckpointWriter(str(run_dir), step, rank) for rank in range(2)]
    for rank, writer in enumerate(writers):
        writer.add("weights", {f"weight{rank}": torch.full((3,), float(step + rank if value is None else value))})
    state = {"step": step, "tokens": 8 * step, "valid_loss": valid_loss, "optimizer": NUMBERS}
    writers[0].commit(writers[0].files | writers[1].files, state, CONFIG, {"fingerprint": "0" * 64, "vocab_size": 9})


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def weights(run_dir, step, rank=0):
    return directory(run_dir, step) / f"weights-{rank:05d}.safetensors"


def test_all_ranks_tensors_come_back_by_name(tmp_path):
    write(tmp_path, 7)
    checkpoint = latest(tmp_path)
    assert checkpoint.step == 7 and checkpoint.validate() == []
    tensors = checkpoint.tensors("weights")
    assert {name: value.tolist() for name, value in tensors.items()} == {"weight0": [7.0] * 3, "weight1": [8.0] * 3}
    assert list(checkpoint.tensors("weights", ["weight1"])) == ["weight1"]
    with pytest.raises(UserError, match="weight9"):
        checkpoint.tensors("weights", ["weight9"])


def keep(run_dir, start, *written, last=2, every=None, keep_best=False):
    """Return the steps that are kept after a start has written some, each given as (step, valid_loss) or step."""
    retention = Retention(str(run_dir), CheckpointConfig(1, last, every, keep_best), start)
    for entry in written:
        step, loss = entry if isinstance(entry, tuple) else (entry, None)
        write(run_dir, step, loss)
        retention.apply(step)
    return steps(run_dir)


def test_the_latest_are_kept(tmp_path):
    assert keep(tmp_path, 0, 5, 10, 15, 20) == [15, 20]
    assert keep(tmp_path, 20, 25, last=1) == [25]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000025"]


def test_multiples_of_keep_every_are_kept_too(tmp_path):
    assert keep(tmp_path, 0, 5, 10, 15, 20, 25, 30, last=1, every=10) == [10, 20, 30]


def test_the_best_is_kept_too(tmp_path):
    losses = [(5, float("nan")), (10, 2.0), (15, 2.5), 20, (25, 3.0), (30, 2.0)]
    assert keep(tmp_path, 0, *losses, last=1, keep_best=True) == [10, 30]
    assert best(tmp_path).step == find_checkpoint(tmp_path, "best").step == 10
    assert keep(tmp_path, 30, (35, 1.0), 40, last=1, keep_best=True) == [35, 40]


@pytest.mark.parametrize("harm", [flip, lambda path: path.unlink(), lambda path: flip(path.parent / "checkpoint.json")])
def test_a_damaged_one_does_not_count_as_kept(tmp_path, harm):
    """A start resumes from 10, before a damaged 20: that never counts, and 10 is kept until two others are valid."""
    keep(tmp_path, 0, 5, 10, 20, last=9)
    harm(weights(tmp_path, 20))
    assert latest(tmp_path, contents=True).step == 10
    assert keep(tmp_path, 10, 15) == [10, 15, 20]
    assert keep(tmp_path, 10, 15, 25) == [15, 25]


def test_an_old_one_that_was_damaged_later_displaces_none(tmp_path):
    keep(tmp_path, 0, (5, 2.0), (10, 1.0), (15, 3.0), last=9)
    flip(weights(tmp_path, 10))
    assert keep(tmp_path, 15, (20, 4.0), last=3, keep_best=True) == [5, 15, 20]


def test_a_damaged_one_is_replaced_when_the_run_comes_again_to_its_step(tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 10, value=1)
    flip(weights(tmp_path, 10))
    assert latest(tmp_path, contents=True).step == 5
    write(tmp_path, 10, value=2)
    assert latest(tmp_path, contents=True).tensors("weights")["weight0"].tolist() == [2.0] * 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000000005", "step-000000010"]


def test_an_interrupted_write_is_not_a_checkpoint(tmp_path):
    write(tmp_path, 5)
    CheckpointWriter(str(tmp_path), 10, 0).add("weights", {"other": torch.zeros(3)})
    assert latest(tmp_path).step == 5  # the one being written does not have its name yet
    Retention(str(tmp_path), CheckpointConfig(1, 2, None, False), 5).remove_leftovers()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000005"]


@pytest.mark.parametrize("harm, words", [("cut", "bytes"), ("flip", "SHA-256 differs"), ("remove", "missing")])
def test_damage_is_named(tmp_path, harm, words):
    write(tmp_path, 5)
    path = weights(tmp_path, 5, rank=1)
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "flip":
        flip(path)
    else:
        path.unlink()
    (error,) = open_checkpoint(directory(tmp_path, 5)).validate()
    assert str(path) in error and words in error


def test_swapped_ranks_are_found(tmp_path):
    write(tmp_path, 5)
    one, two = (weights(tmp_path, 5, rank) for rank in range(2))
    os.replace(one, tmp_path / "aside")
    os.replace(two, one)
    os.replace(tmp_path / "aside", two)
    assert len(open_checkpoint(directory(tmp_path, 5)).validate()) == 2


def test_the_latest_valid_one_is_chosen_and_every_error_reported(tmp_path):
    for step in (5, 10, 15, 20):
        write(tmp_path, step)
    flip(weights(tmp_path, 10))
    flip(weights(tmp_path, 15))
    weights(tmp_path, 15, rank=1).unlink()
    (directory(tmp_path, 20) / "checkpoint.json").unlink()
    lines = []
    assert latest(tmp_path, contents=True, report=lines.append).step == 5
    skipped = [line.removeprefix("checkpoint of step ").split(" skipped: ")[0] for line in lines]
    assert skipped == ["20", "15", "15", "10"]
    assert latest(tmp_path).step == 10  # as far as sizes show


def test_with_none_valid_no_run_starts_from_the_beginning(tmp_path):
    for step in (5, 10):
        write(tmp_path, step)
        flip(weights(tmp_path, step))
    with pytest.raises(UserError) as caught:
        latest(tmp_path, contents=True)
    assert all(str(weights(tmp_path, step)) in str(caught.value) for step in (5, 10)) and "remove" in str(caught.value)


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path):
    write(tmp_path, 5, valid_loss=2.5)
    path = directory(tmp_path, 5) / "checkpoint.json"
    content = path.read_bytes()
    intended = open_checkpoint(path.parent)
    for at in range(len(content)):
        for bit in range(8):
            harmed = bytearray(content)
            harmed[at] ^= 1 << bit
            path.write_bytes(harmed)
            try:
                assert open_checkpoint(path.parent) == intended  # one kind of white space for another
            except UserError as error:
                assert str(path) in str(error)
                continue
            assert chr(content[at]).isspace() and chr(harmed[at]).isspace(), (at, bit)


def test_a_manifest_of_version_1_without_a_hash_can_be_read(tmp_path):
    write(tmp_path, 5)
    path = directory(tmp_path, 5) / "checkpoint.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="sha256"):
        latest(tmp_path)
    path.write_text(json.dumps(manifest | {"version": 1}))
    assert latest(tmp_path).step == 5


def test_a_folder_without_manifest_is_not_a_checkpoint(tmp_path):
    directory(tmp_path, 5).mkdir(parents=True)
    with pytest.raises(UserError, match=r"checkpoint\.json"):
        open_checkpoint(directory(tmp_path, 5))


def test_a_manifest_that_cannot_be_written_is_named(full_disk):
    writer = CheckpointWriter(str(full_disk), 5, rank=0)
    writer.add("weights", {"a": torch.zeros(1)})
    with open(full_disk / "ballast", "wb", buffering=0) as ballast, pytest.raises(OSError):
        while True:
            ballast.write(bytes(4096))
    with pytest.raises(OSError) as caught:
        writer.commit(writer.files, {"step": 5}, {}, {})
    manifest = f"{full_disk}/checkpoints/.step-000000005.partial/checkpoint.json"
    assert describe_os_error(caught.value) == f"{manifest}: No space left on device"


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_all_files_have_the_mode_of_any_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write(tmp_path, 5)
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in directory(tmp_path, 5).iterdir()}
    assert len(modes) == 3 and set(modes.values()) == {oct(mode)}, modes


def put(*keys, value):
    def change(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


def drop(*keys):
    def change(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return change


NAME = "weights-00000.safetensors"
MANIFESTS = {
    **{f"no {'.'.join(keys)}": drop(*keys) for keys in [("state",), ("files",), ("config",), ("data",)]},
    **{f"no config.{section}": drop("config", section) for section in CONFIG},
    **{f"{section} is a list": put("config", section, value=[]) for section in CONFIG},
    "step is a text": put("state", "step", value="5"),
    "step is huge": put("state", "step", value=10**200),
    "step of another": put("state", "step", value=6),
    "tokens are negative": put("state", "tokens", value=-1),
    "the loss is a list": put("state", "valid_loss", value=[1]),
    "the lanes began later": put("state", "origin", value={"step": 6, "tokens": 0}),
    "the lanes began at a text": put("state", "origin", value={"step": "0", "tokens": 0}),
    "a new key of the lanes": put("state", "origin", value={"steps": 0}),
    "optimizer numbers": put("state", "optimizer", value={"state": {"step": "7"}, "group": {}, "loss_scaler": {}}),
    "optimizer group": put("state", "optimizer", value={"state": {}, "group": {"params": 3}, "loss_scaler": {}}),
    "losses": put("state", "losses", value=["x"]),
    "a layer's number": put("config", "model", "n_layer", value="2"),
    "a number of layers below 1": put("config", "model", "n_layer", value=0),
    "the lanes' number": put("config", "data", "num_lanes", value=0.5),
    "a missing fingerprint": put("data", "fingerprint", value=None),
    "a vocabulary of a text": put("data", "vocab_size", value="9"),
    "a tokenizer elsewhere": put("data", "tokenizer", value={"../../x": "0" * 64}),
    "no hash": put("files", NAME, value={"bytes": 5}),
    "bytes are a text": put("files", NAME, "bytes", value="5"),
    "a file elsewhere": put("files", "../weights-00000.safetensors", value={"bytes": 5, "sha256": "0" * 64}),
    "a file at the root": put("files", "/etc/passwd", value={"bytes": 5, "sha256": "0" * 64}),
    "version is a list": put("version", value=[2]),
    "imported": put("state", "imported", value={"from": "x", "title": "y"}),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_a_hashed_manifest_of_other_types_and_paths_is_refused_in_one_line(tmp_path, change):
    write(tmp_path, 5)
    path = directory(tmp_path, 5) / "checkpoint.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    write_manifest(path.parent, manifest)
    with pytest.raises(UserError) as caught:
        open_checkpoint(path.parent)
    message = str(caught.value)
    assert str(path) in message and len(message.splitlines()) == 1 and len(message) < 800


def test_tensors_that_do_not_fit_are_named(tmp_path):
    write(tmp_path, 5)
    checkpoint = open_checkpoint(directory(tmp_path, 5))
    with pytest.raises(UserError, match=r"its weights of weight0 are \[3\], not \[4\]"):
        checkpoint.fitting("weights", {"weight0": (4,)})
    assert checkpoint.shapes("weights") == {"weight0": (3,), "weight1": (3,)}
    weights(tmp_path, 5).write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(UserError, match=r"weights-00000\.safetensors: cannot be read"):
        checkpoint.tensors("weights")


def test_a_model_is_built_only_where_its_tensors_are_there(tmp_path):
    write(tmp_path, 5)
    for number in (10**9, 2**31 - 1):
        with pytest.raises(UserError, match=f"n_layer={number}"):
            parameter_shapes(TransformerXLConfig(**CONFIG["model"] | {"n_layer": number}), 9, at_most=40)
    with pytest.raises(UserError, match="there are only 2"):
        load_model(str(tmp_path), None, {})
