"""JSON files and values of any content are read and shown in few words."""

import pickle

import pytest

from tests.fuzz.mutators import DOUBLED, nested
from txl_dist.files.parsing import describe, read_json, shown


def test_values_of_a_config_are_shown_in_few_words(tmp_path):
    doubled = pickle.loads(b"\x80\2" + DOUBLED + b".")
    assert len(shown(doubled)) <= 200 and len(shown(nested(10**4))) <= 200 and len(shown("x" * 10**6)) <= 200
    assert len(describe(ValueError("x" * 10**6))) <= 300
    (tmp_path / "deep.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match="deep"):
        read_json(tmp_path / "deep.json")
