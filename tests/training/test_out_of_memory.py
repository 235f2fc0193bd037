"""What a run says that has no memory left."""

from types import SimpleNamespace

import pytest
import torch

from txl_dist.errors import UserError
from txl_dist.training.out_of_memory import out_of_memory_reported


def test_a_snapshot_that_cannot_be_written_hides_no_advice(tmp_path):
    (tmp_path / "profile").write_text("")
    engine = SimpleNamespace(gradient_accumulation=1, zero_stage=0)
    job = SimpleNamespace(engine=engine, run=SimpleNamespace(dir=str(tmp_path)))
    group = SimpleNamespace(rank=1, device=torch.device("cuda"))
    with (
        pytest.raises(UserError, match="could not be written: .*/profile: File exists") as error,
        out_of_memory_reported(job, group),
    ):
        raise torch.OutOfMemoryError("no memory")
    assert "Less is taken by a larger engine.gradient_accumulation" in str(error.value)
