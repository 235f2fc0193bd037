"""metrics.jsonl where it cannot be written."""

import pytest

from txl_dist.errors import UserError
from txl_dist.tracking.metrics import MetricsFile, read_metrics


def test_a_full_disk_is_told(tmp_path):
    file = MetricsFile(str(tmp_path), 0)
    file.append({"step": 1})
    assert read_metrics(str(tmp_path)) == [{"step": 1}]
    file.path.unlink()
    file.path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(No space left on device\); make room"):
        file.append({"step": 2})
