"""Third-party files of any content are converted in bounded memory and time, or refused with a message."""

import io
import json
import pickle
import resource
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.conversion.third_party import (
    SHARED_CASES,
    WORDS,
    authors_state,
    convert_job,
    edit_config,
    hugging_face_model,
    refusal,
    save_folder,
)
from tests.fuzz.mutators import BOMBS
from txl_dist.cli import errors_reported
from txl_dist.conversion import pickles
from txl_dist.convert import convert
from txl_dist.errors import UserError


@pytest.fixture(autouse=True)
def little_memory():
    """Two GiB more than there is: a file of some bytes that asks for more is refused before."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def one_line(path):
    with pytest.raises(UserError) as caught:
        pickles.load(path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 600


def archive(path, main, storages, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", main)
        for key, content in storages.items():
            file.writestr(f"archive/data/{key}", content)
    return path


def tensor_of(elements, size, stride, offset=0, key="0"):
    """A pickle of one tensor, as torch.save writes it."""

    class Storage(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, key, "cpu", elements) if obj == "STORAGE" else None

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, ("STORAGE", offset, size, stride, False, {})

    stream = io.BytesIO()
    Storage(stream, protocol=2).dump(Tensor())
    return stream.getvalue()


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
def test_a_pickle_of_some_bytes_asks_for_no_more(bomb, tmp_path):
    path = tmp_path / "model.pt"
    for content in (b"\x80\2" + bomb + b".", b"\x80\2(lp1\n" + bomb + b"a."):
        path.write_bytes(content)
        archive(tmp_path / "zip.pt", content, {})
        for file in (path, tmp_path / "zip.pt"):
            try:
                pickles.load(file)
            except UserError as error:
                assert str(file) in str(error) and len(str(error)) < 600


@pytest.mark.parametrize(
    "elements, size, stride, offset",
    [
        (4, (2**20, 2**20), (0, 0), 0),
        (4, (4,), (1,), 1),
        (4, (3, 3), (1, 1), 0),
        (4, (2,), (2**40,), 0),
        (2**40, (2,), (1,), 0),
        (4, (2**62, 2**62), (0, 0), 0),
        (4, (2**70,), (1,), 0),
        (4, (1,) * 100, (0,) * 100, 0),
        (-1, (0,), (1,), 0),
    ],
)
def test_a_tensor_is_within_its_storage(elements, size, stride, offset, tmp_path):
    one_line(archive(tmp_path / "model.pt", tensor_of(elements, size, stride, offset), {"0": bytes(16)}))


def test_a_compressed_archive_is_refused(tmp_path):
    main = tensor_of(2**26, (2**26,), (1,))
    one_line(archive(tmp_path / "model.pt", main, {"0": bytes(2**28)}, zipfile.ZIP_DEFLATED))


def test_a_storage_of_before_1_6_is_made_only_where_the_file_is_long_enough(tmp_path):
    stream = io.BytesIO()
    for value in (pickles.LEGACY, 1001, {"little_endian": True}):
        pickle.dump(value, stream, protocol=2)
    stream.write(tensor_of(2**33, (2,), (1,)))
    pickle.dump(["0"], stream, protocol=2)
    stream.write(struct.pack("<q", 2**33))
    (tmp_path / "model.pt").write_bytes(stream.getvalue())
    one_line(tmp_path / "model.pt")


def test_a_module_within_itself_is_refused(tmp_path):
    """Written by hand: `_modules` of the object in memo place 0 holds it."""
    content = b"\x80\2cmem\nModel\nq\1)\x81q\0}(X\x08\0\0\0_modules}X\1\0\0\0ah\0sub."
    (tmp_path / "model.pt").write_bytes(content)
    message = refusal(tmp_path / "model.pt", tmp_path / "run")
    assert "r_w_bias: is missing" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layer": 10**9},
        {"n_layer": 2**70},
        {"vocab_size": 2**50},
        {"vocab_size": "50"},
        {"vocab_size": True},
        {"d_inner": 2**60},
        {"cutoffs": list(range(1, 300_000)), "div_val": 10},
        {"cutoffs": list(range(1, 300_000)), "vocab_size": 300_001},
        {"cutoffs": [10], "div_val": 10**30},
        {"d_model": float("inf")},
        {"dropout": float("nan")},
        {"tie_projs": 3, "div_val": 2, "cutoffs": [3]},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_config_that_asks_for_another_model_than_its_tensors_is_refused(changes, tmp_path):
    for number, folder in enumerate([save_folder(hugging_face_model(), tmp_path / "hf"), exported(tmp_path)]):
        message = refusal(edit_config(folder, **changes), tmp_path / f"run-{number}")
        assert len(message) < 2000 and len(message.splitlines()) <= 8 and "Traceback" not in message


def exported(tmp_path):
    convert(convert_job(**{"from": save_folder(hugging_face_model(), tmp_path / "first")}, run=tmp_path / "made"))
    convert(convert_job(run=tmp_path / "made", to=tmp_path / "export"))
    return tmp_path / "export"


def test_many_tensors_of_the_same_few_numbers_are_no_large_model(tmp_path):
    state = authors_state(hugging_face_model(**SHARED_CASES["full softmax"]))
    shared = torch.zeros(60 * 16)
    layer = {name: value for name, value in state.items() if name.startswith("layers.0.")}
    for number in range(2, 400):
        state |= {
            name.replace("layers.0.", f"layers.{number}."): shared[: value.numel()].view(value.shape)
            for name, value in layer.items()
        }
    torch.save(state, tmp_path / "model.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    lengths = dict(tgt_len=5, mem_len=7, clamp_len=-1, same_length=False, pre_lnorm=False)
    message = refusal(tmp_path / "model.pt", tmp_path / "run", tokenizer_from=tmp_path / "vocab.txt", model=lengths)
    assert "parameters, but all tensors only" in message


def test_a_safetensors_file_and_an_index_of_parts_are_refused_in_words(tmp_path):
    folder = save_folder(hugging_face_model(), tmp_path / "hf")
    original = (folder / "model.safetensors").read_bytes()
    for content in (b"", b"x" * 7, b"\xff" * 8 + b"{}", struct.pack("<Q", 2) + b"[]", original[:100], original + b"x"):
        (folder / "model.safetensors").write_bytes(content)
        assert len(refusal(folder, tmp_path / "run").splitlines()) == 1
    save_file({"n": torch.ones(2, dtype=torch.int8)}, folder / "model.safetensors")
    assert len(refusal(folder, tmp_path / "run").splitlines()) == 1
    (folder / "model.safetensors").unlink()
    for index in ({}, [], {"weight_map": 5}, {"weight_map": {"a": 5}}, {"weight_map": {"a": "/etc/passwd"}}):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert len(refusal(folder, tmp_path / "run").splitlines()) == 1


def test_a_lack_of_memory_is_reported_without_a_trace(capsys):
    for allocate in (lambda: torch.empty(2**45), lambda: np.ones(2**40), lambda: bytes(2**45)):
        with pytest.raises(SystemExit) as end, errors_reported():
            allocate()
        assert end.value.code == 1 and "not enough memory" in capsys.readouterr().err
