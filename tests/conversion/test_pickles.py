"""Pickles are read without executing anything in them."""

import os
import pickle

import pytest
import torch

from tests.conversion.third_party import hugging_face_model, refusal, save_folder


class Attack:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "file", ["model.pt", "old.pt", "in a state dict", "pytorch_model.bin", "vocab.pkl", "protocol 0"]
)
def test_a_malicious_pickle_is_refused_and_not_executed(file, tmp_path):
    attack = Attack(tmp_path / "executed")
    path = tmp_path / "model.pt"
    if file == "pytorch_model.bin":
        path = save_folder(hugging_face_model(), tmp_path / "hf", safe=False)
        torch.save({"x": attack}, path / file)
    elif file == "vocab.pkl":
        path = save_folder(hugging_face_model(), tmp_path / "hf")
        (path / "vocab.txt").unlink()
        (path / file).write_bytes(pickle.dumps({"idx2sym": attack}))
    elif file == "protocol 0":
        path.write_bytes(pickle.dumps(attack, protocol=0))
    elif file == "in a state dict":
        torch.save({"r_w_bias": torch.ones(2, 6), "x": attack}, path)
    else:
        torch.save(attack, path, _use_new_zipfile_serialization=file == "model.pt")
    message = refusal(path, tmp_path / "run")
    assert "mkdir" in message and str(path) in message and len(message.splitlines()) == 1
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run").exists()
    pickle.loads(pickle.dumps(attack))
    assert (tmp_path / "executed").exists()  # so it would have been
