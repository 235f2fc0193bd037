"""Checkpoints are whole or absent, and say what is wrong with them."""

import json
import os

import pytest
import torch

from txl_dist.config import CheckpointConfig
from txl_dist.engine.checkpoint import (
    CheckpointWriter,
    best,
    directory,
    find_checkpoint,
    newest,
    open_checkpoint,
    steps,
)
from txl_dist.engine.saving import Retention
from txl_dist.errors import UserError, describe_os_error


def write(run_dir, step, valid_loss=None, value=None):
    writers = [CheckpointWriter(str(run_dir), step, rank) for rank in range(2)]
    for rank, writer in enumerate(writers):
        writer.add("weights", {f"weight{rank}": torch.full((3,), float(step + rank if value is None else value))})
    state = {"step": step, "valid_loss": valid_loss}
    writers[0].commit(writers[0].files | writers[1].files, state, {"run": {}}, {"fingerprint": "x"})


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def weights(run_dir, step, rank=0):
    return directory(run_dir, step) / f"weights-{rank:05d}.safetensors"


def test_all_ranks_tensors_come_back_by_name(tmp_path):
    write(tmp_path, 7)
    checkpoint = newest(tmp_path)
    assert checkpoint.step == 7 and checkpoint.damages() == []
    found = checkpoint.tensors("weights")
    assert {name: value.tolist() for name, value in found.items()} == {"weight0": [7.0] * 3, "weight1": [8.0] * 3}
    assert list(checkpoint.tensors("weights", ["weight1"])) == ["weight1"]
    with pytest.raises(UserError, match="weight9"):
        checkpoint.tensors("weights", ["weight9"])


def keep(run_dir, start, *written, last=2, every=None, keep_best=False):
    """What is there after a start that has written these steps, (step, valid_loss) or step each."""
    retention = Retention(str(run_dir), CheckpointConfig(1, last, every, keep_best), start)
    for each in written:
        step, loss = each if isinstance(each, tuple) else (each, None)
        write(run_dir, step, loss)
        retention.apply(step)
    return steps(run_dir)


def test_the_newest_stay(tmp_path):
    assert keep(tmp_path, 0, 5, 10, 15, 20) == [15, 20]
    assert keep(tmp_path, 20, 25, last=1) == [25]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000025"]


def test_multiples_of_keep_every_stay_too(tmp_path):
    assert keep(tmp_path, 0, 5, 10, 15, 20, 25, 30, last=1, every=10) == [10, 20, 30]


def test_the_best_stays_too(tmp_path):
    losses = [(5, float("nan")), (10, 2.0), (15, 2.5), 20, (25, 3.0), (30, 2.0)]
    assert keep(tmp_path, 0, *losses, last=1, keep_best=True) == [10, 30]
    assert best(tmp_path).step == find_checkpoint(tmp_path, "best").step == 10
    assert keep(tmp_path, 30, (35, 1.0), 40, last=1, keep_best=True) == [35, 40]


@pytest.mark.parametrize("harm", [flip, lambda path: path.unlink(), lambda path: flip(path.parent / "checkpoint.json")])
def test_a_damaged_one_is_none_to_keep(tmp_path, harm):
    """A start goes on from 10, past a damaged 20: that never counts, and 10 stays until two others are whole."""
    keep(tmp_path, 0, 5, 10, 20, last=9)
    harm(weights(tmp_path, 20))
    assert newest(tmp_path, contents=True).step == 10
    assert keep(tmp_path, 10, 15) == [10, 15, 20]
    assert keep(tmp_path, 10, 15, 25) == [15, 25]


def test_an_old_one_that_has_rotted_displaces_none(tmp_path):
    keep(tmp_path, 0, (5, 2.0), (10, 1.0), (15, 3.0), last=9)
    flip(weights(tmp_path, 10))
    assert keep(tmp_path, 15, (20, 4.0), last=3, keep_best=True) == [5, 15, 20]


def test_a_damaged_one_is_replaced_when_the_run_comes_again_to_its_step(tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 10, value=1)
    flip(weights(tmp_path, 10))
    assert newest(tmp_path, contents=True).step == 5
    write(tmp_path, 10, value=2)
    assert newest(tmp_path, contents=True).tensors("weights")["weight0"].tolist() == [2.0] * 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000000005", "step-000000010"]


def test_an_interrupted_write_is_no_checkpoint(tmp_path):
    write(tmp_path, 5)
    CheckpointWriter(str(tmp_path), 10, 0).add("weights", {"other": torch.zeros(3)})
    assert newest(tmp_path).step == 5  # the one being written has no name yet
    Retention(str(tmp_path), CheckpointConfig(1, 2, None, False), 5).sweep()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000005"]


@pytest.mark.parametrize("harm, told", [("cut", "bytes"), ("flip", "content"), ("remove", "missing")])
def test_damage_is_named(tmp_path, harm, told):
    write(tmp_path, 5)
    path = weights(tmp_path, 5, rank=1)
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "flip":
        flip(path)
    else:
        path.unlink()
    (damage,) = open_checkpoint(directory(tmp_path, 5)).damages()
    assert str(path) in damage and told in damage


def test_swapped_ranks_are_found(tmp_path):
    write(tmp_path, 5)
    one, two = (weights(tmp_path, 5, rank) for rank in range(2))
    os.replace(one, tmp_path / "aside")
    os.replace(two, one)
    os.replace(tmp_path / "aside", two)
    assert len(open_checkpoint(directory(tmp_path, 5)).damages()) == 2


def test_the_newest_whole_one_is_chosen_and_every_damage_told(tmp_path):
    for step in (5, 10, 15, 20):
        write(tmp_path, step)
    flip(weights(tmp_path, 10))
    flip(weights(tmp_path, 15))
    weights(tmp_path, 15, rank=1).unlink()
    (directory(tmp_path, 20) / "checkpoint.json").unlink()
    told = []
    assert newest(tmp_path, contents=True, tell=told.append).step == 5
    assert [each.split(" passed over: ")[0] for each in told] == ["step 20", "step 15", "step 15", "step 10"]
    assert newest(tmp_path).step == 10  # as far as sizes tell


def test_with_none_whole_nothing_is_begun_anew(tmp_path):
    for step in (5, 10):
        write(tmp_path, step)
        flip(weights(tmp_path, step))
    with pytest.raises(UserError) as told:
        newest(tmp_path, contents=True)
    assert all(str(weights(tmp_path, step)) in str(told.value) for step in (5, 10)) and "remove" in str(told.value)


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path):
    write(tmp_path, 5, valid_loss=2.5)
    path = directory(tmp_path, 5) / "checkpoint.json"
    content, meant = path.read_bytes(), open_checkpoint(path.parent)
    for at in range(len(content)):
        for bit in range(8):
            harmed = bytearray(content)
            harmed[at] ^= 1 << bit
            path.write_bytes(harmed)
            try:
                assert open_checkpoint(path.parent) == meant  # one kind of white space for another
            except UserError as error:
                assert str(path) in str(error)
                continue
            assert chr(content[at]).isspace() and chr(harmed[at]).isspace(), (at, bit)


def test_a_manifest_of_before_it_was_hashed_can_be_read(tmp_path):
    write(tmp_path, 5)
    path = directory(tmp_path, 5) / "checkpoint.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="sha256"):
        newest(tmp_path)
    path.write_text(json.dumps(manifest | {"version": 1}))
    assert newest(tmp_path).step == 5


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
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
    place = f"{full_disk}/checkpoints/.step-000000005.partial/checkpoint.json"
    assert describe_os_error(caught.value) == f"{place}: No space left on device"
