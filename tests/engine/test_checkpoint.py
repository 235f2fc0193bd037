"""Checkpoints are whole or absent, and say what is wrong with them."""

import pytest
import torch

from txl_dist.engine.checkpoint import CheckpointWriter, directory, newest, open_checkpoint, steps
from txl_dist.errors import UserError


def write(run_dir, step, keep=5):
    writers = [CheckpointWriter(str(run_dir), step, rank) for rank in range(2)]
    writers[0].begin()
    for rank, writer in enumerate(writers):
        writer.add("weights", {f"weight{rank}": torch.full((3,), float(step + rank))})
    writers[0].finish({"step": step}, {"run": {}}, {"fingerprint": "x"}, keep)


def test_all_ranks_tensors_come_back_by_name(tmp_path):
    write(tmp_path, 7)
    checkpoint = newest(tmp_path)
    assert checkpoint.step == 7 and checkpoint.damages() == []
    found = checkpoint.tensors("weights")
    assert {name: value.tolist() for name, value in found.items()} == {"weight0": [7.0] * 3, "weight1": [8.0] * 3}
    assert list(checkpoint.tensors("weights", ["weight1"])) == ["weight1"]
    with pytest.raises(UserError, match="weight9"):
        checkpoint.tensors("weights", ["weight9"])


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        write(tmp_path, step, keep=2)
    assert steps(tmp_path) == [15, 20]


def test_an_interrupted_write_is_no_checkpoint(tmp_path):
    write(tmp_path, 5)
    writer = CheckpointWriter(str(tmp_path), 10, 0)
    writer.begin()
    writer.add("weights", {"weight0": torch.zeros(3)})
    assert newest(tmp_path).step == 5  # the one being written has no name yet
    write(tmp_path, 10)
    assert newest(tmp_path).damages() == [] and len(newest(tmp_path).files) == 2


@pytest.mark.parametrize("harm, told", [("cut", "bytes"), ("flip", "content"), ("remove", "missing")])
def test_damage_is_named(tmp_path, harm, told):
    write(tmp_path, 5)
    path = directory(tmp_path, 5) / "weights-00001.safetensors"
    content = bytearray(path.read_bytes())
    if harm == "cut":
        path.write_bytes(content[:-1])
    elif harm == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    damages = newest(tmp_path).damages()
    assert str(path) in damages[0] and told in damages[0]


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    directory(tmp_path, 5).mkdir(parents=True)
    with pytest.raises(UserError, match=r"checkpoint\.json"):
        open_checkpoint(directory(tmp_path, 5))
