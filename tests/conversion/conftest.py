"""What tests of exported folders need: transformers 5, beside the environment's transformers 4."""

from pathlib import Path

import pytest

from tests.separate_packages import install


@pytest.fixture(scope="session")
def transformers5(request):
    """The environment of a process that imports transformers 5."""
    folder = install(request.config, Path(__file__).with_name("transformers5.txt"))
    return {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
