"""The steps that are to be skipped, as a person or an earlier version wrote them."""

import os

import pytest

from txl_dist.engine.skipped_steps import read_skipped_steps, write_skipped_steps
from txl_dist.errors import UserError

DAMAGED = {
    "empty": b"",
    "cut": b'[{"step": 1, "why": "x"}',
    "not UTF-8": b'[{"step": 1, "why": "\xff"}]',
    "with a byte order mark": b'\xef\xbb\xbf[{"step": 1, "why": "x"}]',
    "zeros": bytes(100),
    "null": b"null",
    "an object": b'{"step": 1, "why": "x"}',
    "numbers": b"[1]",
    "lists": b'[[1, "x"]]',
    "nested": b"[" * 100_000,
    "without why": b'[{"step": 12}]',
    "without step": b'[{"why": "x"}]',
    "with another key": b'[{"step": 1, "why": "x", "lane": 2}]',
    "why null": b'[{"step": 1, "why": null}]',
    "a text for a step": b'[{"step": "12", "why": "x"}]',
    "a fraction": b'[{"step": 1.5, "why": "x"}]',
    "true": b'[{"step": true, "why": "x"}]',
    "not a number": b'[{"step": NaN, "why": "x"}]',
    "zero": b'[{"step": 0, "why": "x"}]',
    "negative": b'[{"step": -1, "why": "x"}]',
    "more digits than a number has": b'[{"step": ' + b"9" * 10_000 + b', "why": "x"}]',
    "twice": b'[{"step": 1, "why": "x"}, {"step": 1, "why": "y"}]',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_steps_that_cannot_be_read_are_refused_with_the_file_and_its_shape(tmp_path, content):
    (tmp_path / "skipped_steps.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_skipped_steps(str(tmp_path))
    message = str(error.value)
    assert (
        message.startswith(f"{tmp_path}/skipped_steps.json: ") and '[{"step": 1200, "why": "bad text"}, ...]' in message
    )
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/proc/self/mem", path)])
def test_what_is_not_a_file_is_refused(tmp_path, make):
    make(tmp_path / "skipped_steps.json")
    with pytest.raises(UserError, match=r"skipped_steps\.json: .*; write it as"):
        read_skipped_steps(str(tmp_path))


def test_steps_are_read(tmp_path):
    assert read_skipped_steps(str(tmp_path)) == {}
    (tmp_path / "skipped_steps.json").write_text('[{"why": "b\u00e4d", "step": 7},\n {"step": 3, "why": 5}]\n')
    assert read_skipped_steps(str(tmp_path)) == {7: "b\u00e4d", 3: "5"}


def test_the_former_name_is_read_where_the_new_one_is_absent(tmp_path):
    (tmp_path / "passed_steps.json").write_text('[{"step": 5, "why": "bad text"}]')
    skipped = read_skipped_steps(str(tmp_path))
    assert skipped == {5: "bad text"}
    write_skipped_steps(str(tmp_path), {8: "nan", **skipped})
    assert read_skipped_steps(str(tmp_path)) == {5: "bad text", 8: "nan"}
    lines = (tmp_path / "skipped_steps.json").read_text().splitlines()
    assert lines == ['[{"step": 5, "why": "bad text"},', ' {"step": 8, "why": "nan"}]']
    (tmp_path / "passed_steps.json").write_text("[")
    assert read_skipped_steps(str(tmp_path)) == {5: "bad text", 8: "nan"}


def test_a_damaged_file_of_the_former_name_is_refused_by_that_name(tmp_path):
    (tmp_path / "passed_steps.json").write_text("[")
    with pytest.raises(UserError, match=r"/passed_steps\.json: .*; write it as"):
        read_skipped_steps(str(tmp_path))
