"""A small dataset, intact and to be damaged."""

import shutil
from pathlib import Path

import pytest

from tests.data.datasets import TRAIN, VALID, random_documents, write


@pytest.fixture(scope="session")
def intact(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("intact"), {"train": TRAIN, "valid": VALID})


@pytest.fixture
def copy(intact, tmp_path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "copy"))


@pytest.fixture(scope="session")
def other_dataset(tmp_path_factory) -> Path:
    """A dataset of exactly the same sizes with other tokens."""
    documents = {"train": random_documents([len(document) for document in TRAIN], seed=5), "valid": VALID}
    return write(tmp_path_factory.mktemp("other"), documents)
